//! Forwards a tar that the caller or a guest made. Only its structure is checked, so that a tar
//! that is cut off is not mistaken for a whole one.

use super::{Copied, check_cancel};
use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use crate::workspace::raw_tar::Watch;
use crate::workspace::tar_writer::{TarWriter, write_all};
use crate::workspace::unpack::stream_error;
use std::io::{Read, Write};

const BLOCK: usize = 512;
const PIECE_BYTES: usize = 64 * 1024;

/// Copies a tar. Its end mark is replaced with an entry named `last`, if given, and a new end mark.
/// `progress` gets the size of each piece. Errors: `invalid_tree` (it is not a tar),
/// `stream_incomplete` (it ends without an end mark, or nobody reads the output), `cancelled`,
/// `host`.
pub fn forward(
    from: &mut dyn Read,
    out: &mut dyn Write,
    last: Option<&str>,
    progress: &mut dyn FnMut(u64),
    cancel: &Cancel,
) -> Result<Copied> {
    let mut watch = Watch::new();
    let mut copied = Copied::default();
    let (mut piece, mut filled) = (vec![0; PIECE_BYTES], 0);
    while !watch.is_at_end() {
        check_cancel(cancel)?;
        let has_more = fill(from, &mut piece, &mut filled)?;
        let whole = filled / BLOCK * BLOCK;
        let mut entries = 0;
        for block in piece[..whole].chunks(BLOCK) {
            watch.feed(block)?;
            if watch.is_at_end() {
                break;
            }
            entries += BLOCK;
        }
        write_all(&mut &mut *out, &piece[..entries], cancel)?;
        copied.bytes += entries as u64;
        progress(entries as u64);
        piece.copy_within(whole..filled, 0);
        filled -= whole;
        if !has_more && !watch.is_at_end() {
            let text = format!(
                "the tar ends after {} entries without an end-of-archive mark",
                watch.entries()
            );
            return Err(Error::new(Kind::StreamIncomplete, text));
        }
    }
    copied.entries = watch.entries();
    let mut end = TarWriter::new(&mut *out, cancel);
    if let Some(last) = last {
        end.data(last.as_bytes(), b"")?;
    }
    end.finish()?;
    drain(from, &mut piece)?;
    Ok(copied)
}

/// Reads until the buffer, of which `filled` bytes are in use, has at least one block. Returns
/// false if the stream ends first.
fn fill(from: &mut dyn Read, buffer: &mut [u8], filled: &mut usize) -> Result<bool> {
    while *filled < BLOCK {
        match from.read(&mut buffer[*filled..]) {
            Ok(0) => return Ok(false),
            Ok(n) => *filled += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(stream_error("read the tar", e)),
        }
    }
    Ok(true)
}

/// How much may follow the end mark. tar pads its last record with zeros.
const PADDING_BYTES_MAX: u64 = 1024 * 1024;

/// Reads the rest, so that its writer does not fail.
fn drain(from: &mut dyn Read, piece: &mut [u8]) -> Result<()> {
    let mut total = 0;
    while total < PADDING_BYTES_MAX {
        let mut filled = 0;
        let has_more = fill(from, piece, &mut filled)?;
        total += filled as u64;
        if !has_more {
            break;
        }
    }
    Ok(())
}
