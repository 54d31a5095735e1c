//! All limits on the content of an image. An image is hostile, so each of its sizes and counts has
//! a limit here, and the readers refuse the image as soon as one is exceeded.

/// Limit of one index, manifest or configuration. Registries accept at most 4 MiB.
pub const DOCUMENT_BYTES_MAX: u64 = 4 << 20;
/// Limit of the entries of an index.
pub const INDEX_ENTRIES_MAX: usize = 1024;
/// Limit of the indexes between a reference and its manifest.
pub const INDEX_DEPTH_MAX: usize = 4;
/// Limit of the layers of an image. Docker builds at most 127.
pub const LAYERS_MAX: usize = 256;
/// Limit of the steps in an image's history.
pub const HISTORY_MAX: usize = 4096;

/// Limit of the entries of all layers of an image together, and of the nodes of its tree. It bounds
/// memory: an entry takes about 1 KiB until the file system is written.
pub const ENTRIES_MAX: u64 = 1_000_000;
/// Limit of the names, link targets and extended attributes of all layers together.
pub const METADATA_BYTES_MAX: u64 = 256 << 20;
/// Limit of one path (PATH_MAX of Linux).
pub const PATH_BYTES_MAX: usize = 4095;
/// Limit of one component of a path (NAME_MAX of Linux).
pub const NAME_BYTES_MAX: usize = 255;
/// Limit of the directories that are nested in each other.
pub const DEPTH_MAX: usize = 1024;
/// Limit of the extended attributes of one entry. ext4 has room for less than a block.
pub const XATTR_BYTES_MAX: usize = 64 << 10;
/// Limit of one PAX header or GNU long name, as in Go's archive/tar.
pub const EXTENSION_BYTES_MAX: u64 = 1 << 20;
/// Limit of the links that are followed in one path (ELOOP of Linux).
pub const LINKS_MAX: usize = 40;
/// Limit of the steps through the tree that all layers together may cost. Honest images need about
/// ten per entry.
pub const STEPS_MAX: u64 = 32_000_000;
/// Limit of the window of a zstd layer, as a power of two. It is the default of the zstd tool.
pub const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// Limit of the layers that are read at the same time.
pub const THREADS_MAX: usize = 4;
/// Limit of the uncompressed layers of an image together, unless the caller sets another.
pub const UNPACKED_BYTES_MAX: u64 = 64 << 30;
/// Limit of the files of an archive.
pub const ARCHIVE_FILES_MAX: usize = 16 << 10;
