"""What memkv and redis-server are both asked: commands a line each, by what they are about.

Words as in a shell, with escapes as in Python. Each script begins with an empty store.
"""

SCRIPTS = {
    "get and set": r"""
        SET
        SET a
        SET a 1
        GET a
        GET
        GET a b
        get missing
        SET a 1 NX
        SET a 1 XX
        SET b 1 XX
        SET b 1 NX
        SET a 2 GET
        SET nope 2 GET
        SET nope 3 NX GET
        SET nope2 3 NX GET
        SET nope3 3 XX GET
        SET a 1 NX XX
        SET a 1 NX NX
        SET a 1 GET GET
        SET a 1 FOO
        SET a 1 PERSIST
        SET "" ""
        GET ""
        SET \x00\r\n\xff \xff\x00\r\n
        GET \x00\r\n\xff
        SETNX a 1
        SETNX snx 1
        SETNX snx 2
        SETNX
        GETSET gs a
        GETSET gs b
        GETSET gs
        GETDEL gs
        GETDEL gs
        MSET a 1 b 2
        MSET a
        MSET a 1 b
        MGET a b c
        MGET
        MSETNX a 1 z 2
        MSETNX y 1 z 2
        MSETNX y 1 z
        MSETNX q
        MSET d 1 d 2 d 3
        GET d
        """,
    "set with an expiry": r"""
        SET a 1 EX
        SET a 1 EX 0
        SET a 1 EX -1
        SET a 1 EX abc
        SET a 1 EX 1.5
        SET a 1 EX " 5"
        SET a 1 EX +5
        SET a 1 EX 05
        SET a 1 EX 9223372036854775807
        SET a 1 PX 9223372036854775807
        SET a 1 PX 99999999999999999999
        SET a 1 EX 10 PX 10
        SET a 1 EX 10 KEEPTTL
        SET a 1 KEEPTTL EX 10
        SET a 1 EX 100
        TTL a
        SET a 2 KEEPTTL
        TTL a
        SET a 2
        TTL a
        SET a 1 EXAT 33177117420
        EXPIRETIME a
        PEXPIRETIME a
        SET a 1 PXAT 33177117420000
        PEXPIRETIME a
        SET a 1 EXAT 1
        GET a
        EXISTS a
        SET a 1 EXAT 0
        SET a 1 PXAT -5
        SETEX se 100 v
        TTL se
        SETEX se 0 v
        SETEX se -1 v
        SETEX se abc v
        SETEX se 9223372036854775 v
        SETEX se 9223372036854776 v
        PSETEX se 100000 v
        PSETEX se 0 v
        PSETEX se 9223372036854775807 v
        SET a v
        GETEX a
        GETEX a EX 100
        TTL a
        GETEX a PERSIST
        TTL a
        GETEX a EX 0
        GETEX a EX abc
        GETEX missing EX abc
        GETEX missing EX 0
        GETEX missing FOO
        GETEX a FOO
        GETEX a EX 10 PERSIST
        GETEX a PERSIST EX 10
        GETEX a KEEPTTL
        GETEX a EXAT 1
        GET a
        """,
    "parts of values": r"""
        APPEND ap hello
        APPEND ap world
        APPEND ap
        GET ap
        STRLEN ap
        STRLEN missing
        GETRANGE ap 0 -1
        GETRANGE ap -3 -1
        GETRANGE ap 3 1
        GETRANGE ap -1 -3
        GETRANGE ap 0 100
        GETRANGE ap 100 200
        GETRANGE ap -100 2
        GETRANGE ap 0 -100
        GETRANGE ap a b
        GETRANGE missing 0 1
        GETRANGE ap 0
        SUBSTR ap 1 3
        SETRANGE ap 5 XYZ
        GET ap
        SETRANGE new 3 abc
        GET new
        SETRANGE new2 3 ""
        EXISTS new2
        SETRANGE ap -1 x
        SETRANGE ap abc x
        SETRANGE ap 536870911 xx
        SETRANGE ap 9223372036854775807 xx
        SETRANGE ap 2 ""
        """,
    "numbers": r"""
        INCR n
        INCR n
        DECR n
        INCRBY n 10
        DECRBY n 3
        INCRBY n abc
        SET ap abc
        INCR ap
        SET big 9223372036854775807
        INCR big
        DECRBY big -1
        SET low -9223372036854775808
        DECR low
        DECRBY n -9223372036854775808
        DECRBY n 9223372036854775807
        INCRBY n 9223372036854775807
        SET sp " 1"
        INCR sp
        SET sp 01
        INCR sp
        SET sp +1
        INCR sp
        SET sp -0
        INCR sp
        SET sp ""
        INCR sp
        SET sp 1_0
        INCR sp
        SET sp 99999999999999999999999
        INCR sp
        SET kept 1 EX 100
        INCR kept
        APPEND kept 0
        SETRANGE kept 0 3
        INCRBYFLOAT kept 1.5
        TTL kept
        """,
    "numbers with a fraction": r"""
        INCRBYFLOAT f 10.5
        INCRBYFLOAT f 0.1
        INCRBYFLOAT f -5
        INCRBYFLOAT f 5.0e3
        INCRBYFLOAT f abc
        INCRBYFLOAT f inf
        INCRBYFLOAT f -inf
        INCRBYFLOAT f nan
        INCRBYFLOAT f " 1"
        INCRBYFLOAT f "1 "
        INCRBYFLOAT f ""
        INCRBYFLOAT f 1e400
        INCRBYFLOAT f -1e400
        INCRBYFLOAT f 1e5000
        INCRBYFLOAT f 1e99999999999
        SET f2 3.0e3
        INCRBYFLOAT f2 200
        SET f3 0.1
        INCRBYFLOAT f3 0.2
        INCRBYFLOAT f3 1e-17
        INCRBYFLOAT f3 1e-18
        INCRBYFLOAT f3 1e17
        INCRBYFLOAT f4 .5
        INCRBYFLOAT f4 5.
        INCRBYFLOAT f4 +.5e+1
        INCRBYFLOAT f4 -6
        INCRBYFLOAT f4 -4
        INCRBYFLOAT f4 -4.5
        INCRBYFLOAT f4 .
        INCRBYFLOAT f4 e5
        INCRBYFLOAT f4 -
        INCRBYFLOAT f4 --5
        INCRBYFLOAT f4 1.2.3
        INCRBYFLOAT f5 123456789012345678901234567890
        INCRBYFLOAT f5 1
        INCRBYFLOAT f6 3.14159265358979323846264338327950288
        INCRBYFLOAT f6 2.71828182845904523536028747135266249
        INCRBYFLOAT f
        """,
    "keys": r"""
        MSET a 1 b 2 n 1
        DEL a b c
        DEL
        UNLINK y z n
        SET n 1
        EXISTS n n missing
        EXISTS
        TYPE n
        TYPE missing
        TYPE
        TOUCH n missing
        RENAME missing x
        RENAME n n
        RENAME n m
        GET m
        SET o 1
        RENAMENX m o
        RENAMENX m p
        RENAMENX missing x
        RENAMENX p p
        SET r1 a EX 1000
        SET r2 b EX 2000
        RENAME r1 r2
        TTL r2
        GET r2
        SET r3 c
        RENAME r3 r2
        TTL r2
        DBSIZE
        DBSIZE x
        FLUSHALL FOO
        FLUSHALL ASYNC SYNC
        FLUSHALL sync
        FLUSHDB ASYNC
        FLUSHDB x
        DBSIZE
        RANDOMKEY
        SET k1 v
        RANDOMKEY
        """,
    "expiry": r"""
        SET e v
        EXPIRE e 100
        TTL e
        EXPIRE e 100 NX
        EXPIRE e 200 XX
        EXPIRE e 100 GT
        EXPIRE e 300 GT
        EXPIRE e 400 LT
        EXPIRE e 100 LT
        EXPIRE e 10 xx gt
        EXPIRE e 100 NX XX
        EXPIRE e 100 NX GT
        EXPIRE e 100 GT LT
        EXPIRE e 100 FOO
        EXPIRE e 100 NX FOO
        EXPIRE e abc
        EXPIRE e 9223372036854775807
        EXPIRE e 9223372036854775
        EXPIRE e -9223372036854775807
        PEXPIRE e 9223372036854775807
        PEXPIRE missing 9223372036854775807
        EXPIRE missing 10
        EXPIRE e
        PERSIST e
        PERSIST e
        PERSIST missing
        TTL e
        PTTL e
        EXPIRE e 10 GT
        EXPIRE e 10 LT
        EXPIRE e 10 XX LT
        TTL missing
        PTTL missing
        EXPIRETIME missing
        EXPIREAT e 33177117420
        EXPIRETIME e
        PEXPIREAT e 33177117420123
        PEXPIRETIME e
        EXPIRETIME e
        PEXPIREAT e 33177117420600
        EXPIRETIME e
        EXPIREAT e abc
        EXPIREAT e 9223372036854775807
        EXPIREAT e -1
        GET e
        SET n 1
        EXPIRE n 0
        GET n
        SET n 1
        EXPIRE n -1
        GET n
        """,
    "walks": r"""
        SET k1 v
        KEYS *
        KEYS k?
        KEYS k[0-9]
        KEYS k[^0-9]
        KEYS k[a
        KEYS [
        KEYS [^
        KEYS []
        KEYS 'k\\1'
        KEYS [j-l]1
        KEYS [l-j]1
        KEYS '[k\\]]1'
        KEYS **1
        KEYS ""
        KEYS
        KEYS a b
        SCAN 0
        SCAN abc
        SCAN -1x
        SCAN " 0"
        SCAN ""
        SCAN 99999999999999999999999999
        SCAN 0 COUNT 0
        SCAN 0 COUNT abc
        SCAN 0 COUNT
        SCAN 0 FOO 1
        SCAN 0 MATCH k* COUNT 100
        SCAN 0 MATCH z* COUNT 100
        SCAN 0 TYPE string
        SCAN 0 TYPE list
        SCAN 0 TYPE foo
        SCAN
        """,
    "the connection": r"""
        PING
        PING hello
        PING a b
        PiNg
        ECHO hi
        ECHO
        SELECT 0
        SELECT 99
        SELECT abc
        SELECT -1
        SELECT 99999999999
        AUTH x
        AUTH default x
        AUTH foo x
        AUTH
        AUTH a b c
        HELLO abc
        HELLO 1
        HELLO 4
        HELLO 2 FOO
        HELLO 2 AUTH a
        HELLO 2 AUTH foo bar
        HELLO 2 SETNAME "a b"
        CLIENT GETNAME
        CLIENT SETNAME foo
        CLIENT GETNAME
        CLIENT SETNAME "a b"
        CLIENT SETNAME ""
        CLIENT GETNAME
        CLIENT FOO
        CLIENT
        CLIENT SETNAME
        CLIENT GETNAME x
        CLIENT NO-EVICT on
        CLIENT NO-EVICT foo
        CLIENT LIST FOO
        CLIENT LIST TYPE foo
        CLIENT LIST TYPE replica
        CLIENT LIST ID abc
        CLIENT KILL 1.2.3.4:5
        CLIENT KILL ID 99999
        CLIENT KILL ID abc
        CLIENT KILL FOO bar
        FOO
        FOO a b c
        FOO "a\nb" 'c'
        foo aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbbbb cccccccccccccccccccccccccccccc
        FOO \xff\xfe \x00
        "" a
        RESET
        RESET x
        """,
    "the server": r"""
        CONFIG GET maxmemory-policy
        CONFIG GET save
        CONFIG GET appendonly
        CONFIG GET nosuch
        CONFIG GET
        CONFIG SET
        CONFIG SET maxmemory
        CONFIG SET nosuch 1
        CONFIG SET maxmemory abc
        CONFIG SET maxmemory 1 maxmemory 2
        CONFIG SET maxclients abc
        CONFIG SET maxclients 0
        CONFIG SET stop-writes-on-bgsave-error maybe
        CONFIG SET save foo
        CONFIG SET save "1"
        CONFIG SET save "0 1"
        CONFIG SET save "100 1 200 2"
        CONFIG GET save
        CONFIG SET save ""
        CONFIG GET save
        CONFIG SET maxmemory 100mb
        CONFIG GET maxmemory
        CONFIG SET maxmemory 1k
        CONFIG GET maxmemory
        CONFIG SET maxmemory 1GB
        CONFIG GET maxmemory
        CONFIG SET maxmemory 0
        CONFIG GET maxmemory
        CONFIG SET appendonly foo
        CONFIG SET dbfilename a/b
        CONFIG SET dir /nonexistent
        CONFIG RESETSTAT
        CONFIG RESETSTAT x
        CONFIG REWRITE
        CONFIG FOO
        CONFIG
        MEMORY USAGE missing
        MEMORY USAGE
        MEMORY USAGE k1 SAMPLES
        MEMORY USAGE k1 FOO 1
        MEMORY FOO
        MEMORY
        BGSAVE FOO
        BGSAVE SCHEDULE x
        SAVE x
        LASTSAVE x
        SHUTDOWN FOO
        SHUTDOWN SAVE NOSAVE
        SHUTDOWN ABORT
        SHUTDOWN ABORT NOW
        COMMAND COUNT x
        COMMAND FOO
        COMMAND INFO nosuch
        COMMAND GETKEYS GET a
        COMMAND GETKEYS MSET a 1 b 2
        COMMAND GETKEYS nosuch a
        COMMAND GETKEYS PING
        COMMAND GETKEYS GET
        TIME x
        ROLE
        ROLE x
        """,
    "transactions": r"""
        EXEC
        DISCARD
        MULTI
        MULTI
        SET a 1
        INCR
        EXEC
        MULTI
        SET a 1
        get a
        GET b
        APPEND a x
        INCR a
        MGET a b
        PING
        EXEC
        WATCH a
        MULTI
        WATCH b
        SET a 2
        EXEC
        WATCH a
        SET a 3
        MULTI
        SET a 4
        EXEC
        GET a
        WATCH a
        UNWATCH
        SET a 5
        MULTI
        SET a 6
        DISCARD
        GET a
        WATCH nokey
        MULTI
        SET nokey 1
        EXEC
        MULTI
        RESET
        EXEC
        WATCH
        MULTI
        EXEC
        """,
    "protocol 3": r"""
        HELLO 3 AUTH default x SETNAME foo
        GET missing
        SET a 1
        MGET a b
        GETDEL x
        CONFIG GET maxmemory-policy
        CLIENT GETNAME
        SET a 1 NX
        SET q 1 GET
        ROLE
        COMMAND INFO nosuch
        COMMAND DOCS nosuch
        WATCH a
        SET a 2
        MULTI
        EXEC
        RESET
        GET missing
        """,
}
