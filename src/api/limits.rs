//! Limits of one line and its descriptors.

/// The longest line in either direction, including its newline.
pub const FRAME_BYTES_MAX: usize = 1024 * 1024;
/// How many descriptors may accompany one request.
pub const FDS_MAX: usize = 4;
