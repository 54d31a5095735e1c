//! `image register`. The file is opened here, with the caller's rights; the daemon gets a
//! descriptor.

use super::printer::Printer;
use super::values::path_error;
use crate::api::frame::Note;
use crate::api::image::{Image, ImageRegister, ImageRegisterRequest};
use crate::client::{Client, Result};
use crate::error::Error;
use crate::ids::{ImageRef, KernelName};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Name of the new image
    #[arg(value_name = "NAME")]
    image: ImageRef,
    /// File with an ext4 file system. It must be yours, and must not change as long as you use the
    /// image
    #[arg(long, value_name = "FILE")]
    rootfs: PathBuf,
    /// Kernel for VMs of the image, from fcctl kernel list [default: that of the guest runtime]
    #[arg(long, value_name = "KERNEL")]
    kernel: Option<KernelName>,
}

/// Registers an image and shows the progress.
pub(super) fn register(client: &mut Client, printer: &Printer, args: Args) -> Result<Image> {
    let file = open(&args.rootfs)?;
    let mut progress = printer.progress(&format!("register image {}", args.image));
    let request = ImageRegisterRequest {
        image: args.image,
        kernel: args.kernel,
    };
    let reply = client.call_more::<ImageRegister>(&request, &[file.as_fd()], &mut |note| {
        if let Note::Progress(p) = note {
            progress.update(&p);
        }
        Ok(())
    });
    Ok(reply?.image)
}

/// Opens a regular file. Opening a pipe would wait, and opening a device may have an effect.
fn open(path: &Path) -> crate::error::Result<File> {
    let doing = || format!("open {}", path.display());
    let stat = std::fs::metadata(path).map_err(|e| path_error(doing(), e))?;
    if !stat.is_file() {
        let text = format!("{}: it is not a regular file", doing());
        return Err(Error::invalid(text).hint("name a file with an ext4 file system"));
    }
    let mut options = File::options();
    options
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    options.open(path).map_err(|e| path_error(doing(), e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let (file, pipe) = (dir.path().join("file"), dir.path().join("pipe"));
        std::fs::write(&file, "x").unwrap();
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
        open(&file).unwrap();
        for other in [dir.path(), &pipe, Path::new("/dev/null")] {
            let e = open(other).unwrap_err();
            assert!(e.to_string().contains("not a regular file"), "{e}");
        }
        let e = open(&dir.path().join("none")).unwrap_err();
        assert_eq!(e.kind(), crate::error::Kind::PathNotFound);
    }
}
