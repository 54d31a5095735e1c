//! Forwards a tar that the caller made. The tar is checked on the way, so that a truncated tar is
//! not mistaken for a complete one.

use super::tar_writer::{TarWriter, write_all};
use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use std::io::{Read, Write};

const BLOCK: usize = 512;
const PIECE_BYTES: usize = 64 * 1024;

/// Follows the structure of a tar whose bytes arrive in pieces of any size. It parses only the
/// headers.
#[derive(Debug, Default)]
pub struct Watch {
    block: Vec<u8>,
    /// The number of bytes of data and padding before the next header.
    skip: u64,
    /// True if the next block is an extension of a sparse header.
    extended: bool,
    zeros: u8,
    entries: u64,
}

fn bad(why: &str) -> Error {
    Error::new(Kind::InvalidTree, format!("read the tar: {why}"))
        .hint("give an uncompressed tar, for instance: zcat x.tar.gz | fcctl workspace prepare {vm} --tar -")
}

impl Watch {
    pub fn new() -> Self {
        Self::default()
    }

    /// Processes the next bytes, and ignores everything after the end of the archive. Returns
    /// `invalid_tree` for an invalid header.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() && !self.has_ended() {
            if self.skip > 0 {
                let n = self.skip.min(bytes.len() as u64);
                self.skip -= n;
                bytes = &bytes[n as usize..];
                continue;
            }
            let n = bytes.len().min(BLOCK - self.block.len());
            self.block.extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            if self.block.len() == BLOCK {
                let block = std::mem::take(&mut self.block);
                self.header(&block)?;
            }
        }
        Ok(())
    }

    fn header(&mut self, block: &[u8]) -> Result<()> {
        if self.extended {
            self.extended = block[504] != 0;
            return Ok(());
        }
        if block.iter().all(|b| *b == 0) {
            self.zeros += 1;
            return Ok(());
        }
        if self.zeros > 0 {
            return Err(bad("one block of zeros, then more data"));
        }
        let header = tar::Header::from_byte_slice(block);
        let sum: u32 = block
            .iter()
            .enumerate()
            .map(|(i, b)| {
                if (148..156).contains(&i) {
                    32
                } else {
                    u32::from(*b)
                }
            })
            .sum();
        if header.cksum().ok() != Some(sum) {
            return Err(bad(if self.entries == 0 {
                "this is not a tar"
            } else {
                "a header is damaged"
            }));
        }
        let kind = header.entry_type();
        // In some archives these types have a size, but they never have data.
        let bodyless = kind.is_dir() || kind.is_symlink() || kind.is_hard_link() || kind.is_fifo();
        let size = if bodyless {
            0
        } else {
            header
                .entry_size()
                .map_err(|_| bad("a header has no size"))?
        };
        self.skip = size
            .div_ceil(BLOCK as u64)
            .checked_mul(BLOCK as u64)
            .ok_or_else(|| bad("a header has an impossible size"))?;
        self.extended = kind.is_gnu_sparse() && block[482] != 0;
        if !(kind.is_gnu_longname()
            || kind.is_gnu_longlink()
            || kind.is_pax_local_extensions()
            || kind.is_pax_global_extensions())
        {
            self.entries += 1;
        }
        Ok(())
    }

    /// True once the first end-of-archive block has been seen.
    pub(super) fn is_at_end(&self) -> bool {
        self.zeros > 0
    }

    /// True once both end-of-archive blocks have been seen.
    pub fn has_ended(&self) -> bool {
        self.zeros >= 2
    }

    pub fn entries(&self) -> u64 {
        self.entries
    }
}

/// Sends a tar as the payload of an import.
///
/// `keep` lists what the guest changed. If the list is not empty, returns `conflict`, because
/// nothing can be left out of this tar; with `--overwrite` the caller passes an empty list. Returns
/// `stream_incomplete` if the tar ends before its end-of-archive blocks, and `invalid_tree` if it
/// is not a valid tar. `progress` gets the number of entries and bytes so far.
pub fn send(
    input: &mut dyn Read,
    out: &mut dyn Write,
    keep: &[Vec<u8>],
    progress: &mut dyn FnMut(u64, u64),
    cancel: &Cancel,
) -> Result<super::plan::Sent> {
    if let Some(first) = keep.first() {
        let shown = super::encode::encode(first);
        return Err(Error::new(
            Kind::Conflict,
            format!(
                "the guest has changed {} files, including {shown}",
                keep.len()
            ),
        )
        .hint("export them with fcctl workspace export, or replace them with --overwrite"));
    }
    let mut meta = TarWriter::new(Vec::new(), cancel);
    meta.data(b"kind", b"raw\n")?;
    let (meta, _) = meta.finish()?;
    let line = format!("fcd-import 1 {}\n", meta.len());
    write_all(&mut &mut *out, line.as_bytes(), cancel)?;
    write_all(&mut &mut *out, &meta, cancel)?;
    let mut bytes = (line.len() + meta.len()) as u64;
    let mut watch = Watch::new();
    let mut buffer = vec![0; PIECE_BYTES];
    loop {
        let n = match input.read(&mut buffer) {
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            other => other.map_err(|e| Error::io("read the tar", e))?,
        };
        if n == 0 {
            break;
        }
        watch.feed(&buffer[..n])?;
        write_all(&mut &mut *out, &buffer[..n], cancel)?;
        bytes += n as u64;
        progress(watch.entries(), bytes);
    }
    if !watch.has_ended() {
        return Err(Error::new(
            Kind::StreamIncomplete,
            format!(
                "the tar ends after {} entries without an end-of-archive mark",
                watch.entries()
            ),
        )
        .hint("the tar is truncated; create it again"));
    }
    out.flush().map_err(|e| Error::io("send the tree", e))?;
    Ok(super::plan::Sent {
        entries: watch.entries(),
        bytes,
        warnings: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let cancel = Cancel::try_new().unwrap();
        let mut t = TarWriter::new(Vec::new(), &cancel);
        t.data(b"a", b"hello").unwrap();
        t.data(&[b'n'; 300], &[7; 1500]).unwrap();
        t.finish().unwrap().0
    }

    fn run(tar: &[u8]) -> Result<super::super::plan::Sent> {
        send(
            &mut &tar[..],
            &mut Vec::new(),
            &[],
            &mut |_, _| {},
            &Cancel::try_new().unwrap(),
        )
    }

    #[test]
    fn tar_in_pieces_of_any_size_is_accepted() {
        let tar = sample();
        assert_eq!(run(&tar).unwrap().entries, 2);
        for piece in [1, 511, 512, 513] {
            let mut w = Watch::new();
            tar.chunks(piece).for_each(|c| w.feed(c).unwrap());
            assert!(w.has_ended());
        }
    }

    #[test]
    fn tar_truncated_anywhere_is_incomplete() {
        let tar = sample();
        // Two blocks of zeros end a tar, so it is truncated at every point before the end of the
        // second block.
        for cut in (0..tar.len())
            .step_by(64)
            .chain([tar.len() - 512, tar.len() - 1])
        {
            assert_eq!(
                run(&tar[..cut]).unwrap_err().kind(),
                Kind::StreamIncomplete,
                "{cut} of {}",
                tar.len()
            );
        }
    }

    #[test]
    fn file_that_is_not_a_tar_is_rejected() {
        assert_eq!(run(&[0x1f; 2048]).unwrap_err().kind(), Kind::InvalidTree);
    }

    #[test]
    fn tar_conflicts_with_guest_changes() {
        let e = send(
            &mut &sample()[..],
            &mut Vec::new(),
            &[b"x".to_vec()],
            &mut |_, _| {},
            &Cancel::try_new().unwrap(),
        );
        assert_eq!(e.unwrap_err().kind(), Kind::Conflict);
    }
}
