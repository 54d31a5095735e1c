//! Creates loop devices by ioctl (include/uapi/linux/loop.h in Linux). The kernel detaches them
//! when nothing uses them any more, so nothing is left behind if the daemon dies between two steps.
//! `losetup` cannot create such devices.

use crate::error::{Error, Kind, Result};
use linux_raw_sys::loop_device::{
    LO_FLAGS_AUTOCLEAR, LO_FLAGS_READ_ONLY, LOOP_CONFIGURE, LOOP_CTL_GET_FREE, loop_config,
};
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const CONTROL: &str = "/dev/loop-control";
/// The number of attempts to take a free device, because another process may take it first.
const TRIES_MAX: u32 = 64;

/// A block device for a file. The kernel detaches it once this value is dropped and nothing else
/// has the device open.
#[derive(Debug)]
pub(super) struct LoopDevice {
    device: File,
    /// The device's number as `major:minor`, the form that device-mapper expects.
    pub number: String,
}

/// Attaches the file to a free loop device.
pub(super) fn attach(path: &Path, is_readonly: bool) -> Result<LoopDevice> {
    crate::locks::may_block("file access");
    let doing = || format!("attach {} to a loop device", path.display());
    let io = |e: std::io::Error| Error::io(doing(), e);
    let file = OpenOptions::new()
        .read(true)
        .write(!is_readonly)
        .open(path)
        .map_err(io)?;
    let control = OpenOptions::new()
        .read(true)
        .write(true)
        .open(CONTROL)
        .map_err(|e| {
            Error::new(Kind::Host, format!("{}: open {CONTROL}", doing()))
                .with_source(e)
                .hint("modprobe loop, and run fcd as root")
        })?;
    for _ in 0..TRIES_MAX {
        let device = open_free(&control, is_readonly).map_err(io)?;
        match configure(&device, &file, is_readonly) {
            Ok(()) => return finish(device).map_err(io),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
            Err(e) => return Err(io(e)),
        }
    }
    Err(Error::new(
        Kind::Host,
        format!("{}: other processes took every free device", doing()),
    )
    .hint("try again; losetup -l lists the devices"))
}

fn finish(device: File) -> std::io::Result<LoopDevice> {
    let rdev = device.metadata()?.rdev();
    let number = format!("{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev));
    Ok(LoopDevice { device, number })
}

impl LoopDevice {
    pub(super) fn sectors(&self) -> Result<u64> {
        super::sectors(&self.device).map_err(|e| Error::io("read the size of a loop device", e))
    }
}

#[allow(unsafe_code)]
fn open_free(control: &File, is_readonly: bool) -> std::io::Result<File> {
    crate::locks::may_block("file access");
    // SAFETY: LOOP_CTL_GET_FREE takes no argument.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), libc::Ioctl::from(LOOP_CTL_GET_FREE)) };
    if number < 0 {
        return Err(std::io::Error::last_os_error());
    }
    OpenOptions::new()
        .read(true)
        .write(!is_readonly)
        .open(format!("/dev/loop{number}"))
}

#[allow(unsafe_code)]
fn configure(device: &File, file: &File, is_readonly: bool) -> std::io::Result<()> {
    // SAFETY: loop_config is plain data, for which all zeroes are valid.
    let mut config: loop_config = unsafe { std::mem::zeroed() };
    config.fd = file.as_raw_fd().cast_unsigned();
    config.info.lo_flags = LO_FLAGS_AUTOCLEAR as u32
        | if is_readonly {
            LO_FLAGS_READ_ONLY as u32
        } else {
            0
        };
    // SAFETY: LOOP_CONFIGURE reads one loop_config, which outlives the call.
    let status = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            libc::Ioctl::from(LOOP_CONFIGURE),
            &raw const config,
        )
    };
    if status < 0 {
        Err(std::io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::fs::FileExt;

    fn backing(number: &str) -> Option<String> {
        std::fs::read_to_string(format!("/sys/dev/block/{number}/loop/backing_file"))
            .ok()
            .map(|s| s.trim().to_owned())
    }

    #[test]
    fn loop_device_ends_with_its_last_user() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED because it needs root: loop_device_ends_with_its_last_user");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, vec![7; 8192]).unwrap();
        let device = attach(&path, false).unwrap();
        assert_eq!(device.sectors().unwrap(), 16);
        assert_eq!(
            backing(&device.number).unwrap(),
            path.canonicalize().unwrap().display().to_string()
        );
        device.device.write_all_at(&[9; 512], 0).unwrap();
        device.device.sync_all().unwrap();
        assert_eq!(
            std::fs::read(&path).unwrap()[..513],
            [vec![9; 512], vec![7]].concat()
        );
        let number = device.number.clone();
        let other = OpenOptions::new()
            .read(true)
            .open(format!("/dev/loop{}", number.split(':').nth(1).unwrap()))
            .unwrap();
        drop(device);
        assert!(backing(&number).is_some(), "the device is still open");
        drop(other);
        assert_ne!(backing(&number), Some(path.display().to_string()));
    }

    #[test]
    fn readonly_loop_device_refuses_writes() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED because it needs root: readonly_loop_device_refuses_writes");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, vec![7; 4096]).unwrap();
        let mut device = attach(&path, true).unwrap();
        assert!(device.device.write_all(&[9; 512]).is_err());
        let mut first = [0];
        device.device.read_exact(&mut first).unwrap();
        assert_eq!(first, [7]);
    }
}
