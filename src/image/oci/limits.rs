//! Every limit on what an image may contain. An image is hostile, so each of its sizes and counts
//! has a limit here, and the readers refuse the image as soon as one is exceeded.

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
