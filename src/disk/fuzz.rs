//! The fuzz target for the parts of a root disk that the daemon reads, for `tests/fuzz`.

use super::Method;
use super::flatten::pieces;
use super::read_at::{Piece, ReadAt};
use super::unmounted::look;

impl ReadAt for &[u8] {
    fn read_at(&self, buffer: &mut [u8], at: u64) -> std::io::Result<usize> {
        let rest = usize::try_from(at)
            .ok()
            .and_then(|at| self.get(at..))
            .unwrap_or_default();
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }
}

/// Reads a disk whose content a hostile guest has written.
pub fn root_disk(input: &[u8]) {
    for method in [Method::Copy, Method::Qcow2] {
        look(&input, method).expect("any content has an answer");
    }
    const SIZE_BYTES: u64 = 64 << 20;
    for method in [Method::Qcow2, Method::DmSnapshot] {
        let mut inside = |piece: Piece| {
            assert!(piece.at + piece.bytes <= SIZE_BYTES);
            Ok(true)
        };
        pieces(&input, method, SIZE_BYTES, &mut inside).expect("any content has an answer");
    }
}
