/* Hand the dirty pages of [offset, offset + length) of fd to the disk without waiting; with wait, also wait until they
 * and what was under way there are written: sync_file_range(2). It syncs no metadata, so a file needs fsync all the
 * same.
 *
 * Returns 0 or -errno. -ENOSYS, -EINVAL, -ESPIPE, -EOPNOTSUPP: there is no such thing for this fd. Anything else is an
 * error of the disk's, which the kernel tells once for each open file: a later fsync on fd may not know of it.
 * Thread-safe. Needs no GIL; blocks. */
int ms_writeback(int fd, int64_t offset, int64_t length, int wait);
