//! `image export`. The output is opened here, with the caller's rights; the daemon writes into a
//! pipe.

use super::context::Stdio;
use super::draft::Draft;
use super::pipes::{self, End};
use super::printer::Printer;
use super::signals::Interrupts;
use super::transfer::conclude;
use crate::api::frame::Note;
use crate::api::image::{ExportFormat, ImageExport, ImageExportReply, ImageExportRequest};
use crate::client::{Client, Result};
use crate::error::{Error, Kind};
use crate::host::thread;
use crate::ids::ImageRef;
use crate::locks::{Cancel, CancelCause};
use crate::workspace::patch::check_target;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const PIECE_BYTES: usize = 256 << 10;
/// A pipe that is ready for writing has room for this many bytes (PIPE_BUF of Linux).
const PIPE_ROOM_BYTES: usize = 4096;

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    image: ImageRef,
    /// Write to this new file, or to stdout if it is -
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// The archive that docker load reads, or the ext4 file system itself
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "oci")]
    format: Format,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum Format {
    Oci,
    Raw,
}

impl Args {
    /// True if the image is written to stdout.
    pub(super) fn is_stdout(&self) -> bool {
        self.output == Path::new("-")
    }
}

/// The destination of an image.
enum Target {
    File(Draft),
    Stdout(File),
}

impl Target {
    fn open(args: &Args, stdio: &Stdio) -> crate::error::Result<Self> {
        if args.is_stdout() {
            if stdio.stdout_is_terminal() {
                let text = "an image is not written to a terminal";
                return Err(Error::invalid(text).hint("name a file: -o FILE"));
            }
            let stdout = stdio.stdout.try_clone();
            let stdout = stdout.map_err(|e| Error::io("duplicate stdout", e))?;
            return Ok(Self::Stdout(stdout));
        }
        let path = &args.output;
        check_target(path)?;
        Draft::new(path).map(Self::File)
    }

    /// Returns why the image could not be written.
    fn error(&self, e: io::Error) -> Error {
        match self {
            Self::File(draft) => draft.error(e),
            Self::Stdout(_) => Error::io("write the image to stdout", e),
        }
    }
}

/// Exports an image and shows the progress. A file appears only when it is complete.
pub(super) fn export(
    client: &mut Client,
    printer: &Printer,
    interrupts: &Interrupts,
    stdio: &Stdio,
    args: &Args,
) -> Result<ImageExportReply> {
    let target = Target::open(args, stdio)?;
    let stop = Cancel::try_new().map_err(|e| Error::io("make a cancel token", e))?;
    let fired = stop.clone();
    interrupts.on_end(move || fired.cancel(CancelCause::Interrupted));
    let (ours, theirs) = pipes::from_daemon(&stop)?;
    let token = stop.clone();
    let receiver = thread::spawn("receive image", move || {
        let result = receive(ours, target, &token);
        (result, token.is_cancelled())
    })?;
    let request = ImageExportRequest {
        image: args.image.clone(),
        format: match args.format {
            Format::Oci => ExportFormat::Oci,
            Format::Raw => ExportFormat::Raw,
        },
    };
    let mut progress = printer.progress(&format!("export {}", args.image));
    let in_flight = client.begin::<ImageExport>(&request, &[theirs.as_fd()]);
    drop(theirs);
    let reply = in_flight.and_then(|call| {
        call.finish(&mut |note| {
            if let Note::Progress(p) = note {
                progress.update(&p);
            }
            Ok(())
        })
    });
    drop(progress);
    let (reply, received) = conclude(reply, Some(receiver), &stop)?;
    let Some((target, bytes)) = received else {
        return Err(Error::internal("an export ended without its receiver").into());
    };
    if bytes != reply.bytes {
        let text = format!("{bytes} bytes arrived, but fcd has sent {}", reply.bytes);
        return Err(Error::new(Kind::StreamIncomplete, text)
            .hint("try again")
            .into());
    }
    if let Target::File(draft) = target {
        draft.publish()?;
    }
    Ok(reply)
}

/// Writes everything that arrives. Returns the target and the number of bytes.
fn receive(
    mut from: End,
    mut target: Target,
    cancel: &Cancel,
) -> crate::error::Result<(Target, u64)> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut bytes = 0;
    loop {
        let read = fill(&mut from, &mut piece)?;
        let written = match &mut target {
            Target::File(draft) => write_sparse(draft.file(), bytes, &piece[..read]),
            Target::Stdout(stdout) => write_all(stdout, &piece[..read], cancel),
        };
        written.map_err(|e| target.error(e))?;
        bytes += read as u64;
        if read < piece.len() {
            break;
        }
    }
    if let Target::File(draft) = &target {
        // The file may end with a hole.
        let sized = draft.file().set_len(bytes);
        sized.map_err(|e| target.error(e))?;
    }
    Ok((target, bytes))
}

/// Reads until the buffer is full or the stream ends. Returns the number of bytes.
fn fill(from: &mut End, buffer: &mut [u8]) -> crate::error::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match from.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(e) => return Err(Error::io("receive the image", e)),
        }
    }
    Ok(filled)
}

/// Writes the bytes. Blocks of zeroes become holes.
fn write_sparse(file: &File, at: u64, bytes: &[u8]) -> io::Result<()> {
    const BLOCK: usize = 4096;
    const ZEROES: [u8; BLOCK] = [0; BLOCK];
    // Comparing slices is fast even in a debug build.
    let is_zero = |block: &[u8]| *block == ZEROES[..block.len()];
    let mut done = 0;
    while done < bytes.len() {
        let rest = &bytes[done..];
        // Write all blocks up to the next zero block in one call.
        let blocks = rest.chunks(BLOCK).take_while(|block| !is_zero(block));
        let len = blocks.map(<[u8]>::len).sum::<usize>();
        if len > 0 {
            file.write_all_at(&rest[..len], at + done as u64)?;
            done += len;
        } else {
            done += rest.len().min(BLOCK);
        }
    }
    Ok(())
}

/// Writes to stdout. `cancel` ends the wait for a pipe that nobody reads.
fn write_all(stdout: &mut File, mut bytes: &[u8], cancel: &Cancel) -> io::Result<()> {
    while !bytes.is_empty() {
        pipes::wait(stdout.as_fd(), nix::poll::PollFlags::POLLOUT, cancel, None)?;
        match stdout.write(&bytes[..bytes.len().min(PIPE_ROOM_BYTES)]) {
            Ok(written) => bytes = &bytes[written..],
            // Another process that shares the file description made it non-blocking, and wrote
            // first.
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn zeroes_become_holes_and_data_is_kept() {
        let file = tempfile::tempfile().unwrap();
        let mut bytes = vec![0; 1 << 20];
        for at in [0, 300_000, 300_001, 700_000, (1 << 20) - 1] {
            bytes[at] = 7;
        }
        let (head, tail) = bytes.split_at(PIECE_BYTES);
        write_sparse(&file, 0, head).unwrap();
        write_sparse(&file, PIECE_BYTES as u64, tail).unwrap();
        let mut back = vec![1; 1 << 20];
        file.read_exact_at(&mut back, 0).unwrap();
        assert!(back == bytes);
        let used = file.metadata().unwrap().blocks() * 512;
        assert!(used <= 64 << 10, "{used}");
    }

    #[test]
    fn stdout_that_nobody_reads_is_given_up() {
        let (_reader, writer) = io::pipe().unwrap();
        let mut stdout = File::from(std::os::fd::OwnedFd::from(writer));
        let cancel = Cancel::try_new().unwrap();
        let token = cancel.clone();
        let stopper = thread::spawn("stopper", move || token.cancel(CancelCause::CommandEnded));
        let e = write_all(&mut stdout, &vec![0; 1 << 20], &cancel).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::ConnectionAborted);
        stopper.unwrap().join().unwrap();
    }
}
