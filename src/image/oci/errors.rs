//! The errors of this module.

use crate::error::{Error, Kind};
use crate::host::text;
use crate::locks::Cancel;

/// Returns the error for an image that is malformed, exceeds a limit, or contradicts itself.
pub(super) fn bad(message: impl Into<String>) -> Error {
    Error::new(Kind::InvalidImage, message)
}

/// Converts the error of a reader. If one of fcd's readers has put an [`Error`] into the I/O error,
/// its kind is kept.
pub(super) fn read_error(doing: impl Into<String>, error: std::io::Error) -> Error {
    match error.downcast::<Error>() {
        Ok(error) => error.context(doing.into()),
        Err(error) => Error::io(doing, error),
    }
}

/// Converts an error so that it passes through a reader; [`read_error`] is the other direction.
pub(super) fn as_io(error: Error) -> std::io::Error {
    std::io::Error::other(error)
}

/// Fails if the token has fired.
pub(super) fn check_cancel(cancel: &Cancel) -> Result<(), Error> {
    match cancel.cause() {
        None => Ok(()),
        Some(cause) => {
            let message = format!("pull the image: cancelled: {cause}");
            Err(Error::new(Kind::Cancelled, message).with_source(cause.clone()))
        }
    }
}

/// Shows a path from a layer in quotes, escaped and shortened.
pub(super) fn shown(path: &[u8]) -> String {
    text::quoted(&String::from_utf8_lossy(path))
}

/// The source of the error of a layer that was not read because another one had failed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stopped;

impl std::fmt::Display for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("another layer failed")
    }
}

impl std::error::Error for Stopped {}

pub(super) fn stopped() -> Error {
    Error::new(Kind::Cancelled, "the layer was not read").with_source(Stopped)
}
