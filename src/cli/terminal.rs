//! The user's terminal: its size, and a raw mode that is always undone.

use crate::api::exec::PtySize;
use crate::error::{Error, Result};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use std::fs::File;

/// The size of a terminal that does not report one.
pub(super) const DEFAULT_SIZE: PtySize = PtySize { rows: 24, cols: 80 };

/// Returns the terminal's size, or `None` if the file is not a terminal.
pub(super) fn size(file: &File) -> Option<PtySize> {
    let size = tcgetwinsize(file).ok()?;
    if size.ws_row == 0 || size.ws_col == 0 {
        return Some(DEFAULT_SIZE);
    }
    Some(PtySize {
        rows: size.ws_row,
        cols: size.ws_col,
    })
}

/// Raw mode until this is dropped, even by a panic. Nothing may call `process::exit` while one
/// exists.
pub(super) struct RawMode {
    file: File,
    before: Termios,
}

impl RawMode {
    pub(super) fn enter(file: &File) -> Result<Self> {
        let doing = "switch the terminal to raw mode";
        let file = file.try_clone().map_err(|e| Error::io(doing, e))?;
        let before = tcgetattr(&file).map_err(|e| Error::io(doing, e))?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&file, OptionalActions::Now, &raw).map_err(|e| Error::io(doing, e))?;
        Ok(Self { file, before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Fails if the terminal no longer exists.
        let _ = tcsetattr(&self.file, OptionalActions::Now, &self.before);
    }
}

/// A terminal that does not show what is typed, until this is dropped.
pub(super) struct NoEcho {
    file: File,
    before: Termios,
}

impl NoEcho {
    pub(super) fn enter(file: &File) -> Result<Self> {
        let doing = "hide what is typed";
        let file = file.try_clone().map_err(|e| Error::io(doing, e))?;
        let before = tcgetattr(&file).map_err(|e| Error::io(doing, e))?;
        let mut hidden = before.clone();
        hidden.local_modes.remove(LocalModes::ECHO);
        hidden.local_modes.insert(LocalModes::ECHONL);
        tcsetattr(&file, OptionalActions::Flush, &hidden).map_err(|e| Error::io(doing, e))?;
        Ok(Self { file, before })
    }
}

impl Drop for NoEcho {
    fn drop(&mut self) {
        let _ = tcsetattr(&self.file, OptionalActions::Now, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_mode_is_undone_by_panic() {
        let pty = nix::pty::openpty(None, None).unwrap();
        let terminal = File::from(pty.slave);
        let is_raw = || {
            !tcgetattr(&terminal)
                .unwrap()
                .local_modes
                .contains(LocalModes::ICANON)
        };
        assert!(!is_raw());
        let caught = std::panic::catch_unwind(|| {
            let _raw = RawMode::enter(&terminal).unwrap();
            assert!(is_raw());
            std::panic::resume_unwind(Box::new(()));
        });
        assert!(caught.is_err());
        assert!(!is_raw());
        assert_eq!(size(&terminal), Some(DEFAULT_SIZE));
        assert_eq!(size(&tempfile::tempfile().unwrap()), None);
    }
}
