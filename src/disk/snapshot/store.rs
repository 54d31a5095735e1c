//! Reads a store without the kernel (dm-snap-persistent.c).

use super::super::read_at::{Piece, ReadAt, read};
use super::{CHUNK_BYTES, CHUNK_SECTORS, EXCEPTIONS_PER_AREA};

const MAGIC: u32 = 0x7041_6e53;
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 16;
const EXCEPTION_BYTES: usize = 16;

/// Visits the changed chunks of a disk of `size_bytes` until `visit` returns false. Returns false
/// if the file is not a valid store.
pub(in super::super) fn exceptions(
    store: &impl ReadAt,
    size_bytes: u64,
    visit: &mut dyn FnMut(Piece) -> std::io::Result<bool>,
) -> std::io::Result<bool> {
    let mut header = [0; HEADER_BYTES];
    read(store, &mut header, 0)?;
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap_or_default());
    if (word(0), word(8), u64::from(word(12))) != (MAGIC, VERSION, CHUNK_SECTORS) || word(4) == 0 {
        return Ok(false);
    }
    let mut area = vec![0; CHUNK_BYTES as usize];
    for n in 0..size_bytes
        .div_ceil(CHUNK_BYTES)
        .div_ceil(EXCEPTIONS_PER_AREA)
    {
        area.fill(0);
        read(
            store,
            &mut area,
            (1 + n * (1 + EXCEPTIONS_PER_AREA)) * CHUNK_BYTES,
        )?;
        for exception in area.chunks_exact(EXCEPTION_BYTES) {
            let chunk = |at: usize| {
                u64::from_le_bytes(exception[at..at + 8].try_into().unwrap_or_default())
            };
            let (old, new) = (chunk(0), chunk(8));
            // The first chunk holds the header, so this is the end of the exceptions.
            if new == 0 {
                return Ok(true);
            }
            let piece = Piece {
                at: old.saturating_mul(CHUNK_BYTES),
                from: Some(new.saturating_mul(CHUNK_BYTES)),
                bytes: CHUNK_BYTES,
            };
            if !visit(piece)? {
                return Ok(true);
            }
        }
    }
    Ok(true)
}
