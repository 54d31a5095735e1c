//! The helper's side: reads a file system and writes its files as a tar archive.

use super::messages::{MESSAGE_BYTES_MAX, Message, Order};
use crate::error::{Error, Result};
use crate::host::confine::{Allowed, Asked, Call, Profile};
use crate::image::ext4::write_tar;
use crate::image::helper_side::{self, Daemon};
use crate::image::pull::Failure;
use crate::sched::Instant;
use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::time::Duration;

/// This helper's name for [`crate::host::confine::spawn`].
pub(crate) const NAME: &str = "layer";
const MEMORY_BYTES_MAX: u64 = 1 << 30;
/// The size limit of the layer that the helper writes.
const FILE_BYTES_MAX: u64 = 1 << 40;
const OPEN_FILES_MAX: u64 = 16;
const WRITE_BYTES: usize = 1 << 20;
const BLOCK_BYTES: usize = 4096;
const ZEROES: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
/// How often progress is reported at most.
const REPORT_EVERY: Duration = Duration::from_millis(200);

const PROFILE: Profile = Profile {
    memory_bytes_max: MEMORY_BYTES_MAX,
    open_files_max: OPEN_FILES_MAX,
    has_threads: false,
    has_network: false,
    readable: &[],
    file_bytes_max: FILE_BYTES_MAX,
    calls: &[
        Call(libc::SYS_pread64, Allowed::Always),
        Call(libc::SYS_pwrite64, Allowed::Always),
        Call(libc::SYS_ftruncate, Allowed::Always),
    ],
};

/// Runs this process as the helper of one export.
pub(crate) fn run(asked: &Asked) -> ExitCode {
    helper_side::run(asked, &PROFILE, serve, |ended| match ended {
        Ok(()) => Message::Done,
        Err(e) => Message::Failed(Failure::from(e)),
    })
}

fn serve(daemon: &Daemon) -> Result<()> {
    crate::locks::may_block("file access");
    let io = |e| Error::io("receive the file system", e);
    let (order, fds): (Order, _) = daemon.receive(MESSAGE_BYTES_MAX).map_err(io)?;
    let mut fds = fds.into_iter().map(File::from);
    let (Some(disk), Some(layer)) = (fds.next(), fds.next()) else {
        return Err(Error::internal("the first message has no files"));
    };
    let (done, reported) = (Cell::new(0), Cell::new(Instant::now()));
    let progress = |bytes: u64| {
        done.set(done.get() + bytes);
        if reported.get().elapsed() >= REPORT_EVERY {
            reported.set(Instant::now());
            // Sending fails only if the daemon has ended, and then this process is killed.
            let _ = daemon.send(&Message::Progress(done.get()));
        }
    };
    let mut to = BufWriter::with_capacity(WRITE_BYTES, Sparse { file: layer, at: 0 });
    write_tar(&disk, &mut to, order.bytes_max, &progress)?;
    let Sparse { file, at } = to.get_ref();
    file.set_len(*at)
        .map_err(|e| Error::io("write the layer", e))
}

/// A file in which blocks of zeroes become holes, so that sparse files take no space.
struct Sparse {
    file: File,
    at: u64,
}

impl Write for Sparse {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for block in bytes.chunks(BLOCK_BYTES) {
            if *block != ZEROES[..block.len()] {
                self.file.write_all_at(block, self.at)?;
            }
            self.at += block.len() as u64;
        }
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
