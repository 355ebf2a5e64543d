/* How many forks lie between the process that loaded this and the calling one. What was made in one process belongs to
 * it alone as long as the number stays the same. A process id is no such mark: the first process of a container and the
 * first of a namespace that it makes are both number 1. Children without fork handlers, of vfork() or a bare clone(),
 * are not counted. Thread-safe. Needs no GIL. */
unsigned ms_generation(void);
