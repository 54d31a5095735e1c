//! The errors of this module.

use crate::error::{Error, Kind};

/// The image is malformed, exceeds a limit, or lies.
pub(super) fn bad(message: impl Into<String>) -> Error {
    Error::new(Kind::InvalidImage, message)
}

/// Converts the error of a reader. A reader of ours puts an [`Error`] into the I/O error, and that
/// one keeps its kind.
pub(super) fn read_error(doing: impl Into<String>, error: std::io::Error) -> Error {
    match error.downcast::<Error>() {
        Ok(error) => error.context(doing.into()),
        Err(error) => Error::io(doing, error),
    }
}
