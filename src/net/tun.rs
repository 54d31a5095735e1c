//! Tap devices by ioctl (Linux, Documentation/networking/tuntap.rst). `ip tuntap` cannot change the
//! owner of an existing tap.

use crate::error::{Error, Kind, Result};
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;

pub(super) const DEVICE: &str = "/dev/net/tun";

/// Creates a persistent tap that root owns and that is down. Returns false if an interface of this
/// name exists.
pub(super) fn create(name: &str) -> Result<bool> {
    let doing = || format!("create tap {name}");
    let tun = open().map_err(|e| open_error(e).context(doing()))?;
    let io = |e: std::io::Error| Error::io(doing(), e);
    match attach(&tun, name, libc::IFF_TUN_EXCL) {
        Ok(()) => {}
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => return Ok(false),
        Err(e) => return Err(io(e)),
    }
    // Any user who may open the device could attach to a tap without an owner.
    set(&tun, libc::TUNSETOWNER, 0).map_err(io)?;
    set(&tun, libc::TUNSETPERSIST, 1).map_err(io)?;
    Ok(true)
}

/// Lets `uid` attach to this tap. Root always can.
pub(super) fn set_owner(name: &str, uid: u32) -> Result<()> {
    let doing = || format!("give tap {name} to uid {uid}");
    let tun = open().map_err(|e| open_error(e).context(doing()))?;
    let io = |e: std::io::Error| Error::io(doing(), e);
    attach(&tun, name, 0).map_err(io)?;
    set(&tun, libc::TUNSETOWNER, uid.into()).map_err(io)
}

/// Attaches to a tap like a VMM.
#[cfg(test)]
pub(super) fn connect(name: &str) -> std::io::Result<File> {
    crate::locks::may_block("file access");
    use std::os::unix::fs::OpenOptionsExt;
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(DEVICE)?;
    attach(&tun, name, 0)?;
    Ok(tun)
}

fn open() -> std::io::Result<File> {
    crate::locks::may_block("file access");
    OpenOptions::new().read(true).write(true).open(DEVICE)
}

fn open_error(e: std::io::Error) -> Error {
    let hint = match e.kind() {
        std::io::ErrorKind::NotFound => "modprobe tun",
        _ => "run fcd as root, or set driver = \"user\" under [network]",
    };
    Error::new(Kind::Host, format!("open {DEVICE}"))
        .with_source(e)
        .hint(hint)
}

#[allow(unsafe_code)]
fn attach(tun: &File, name: &str, more_flags: libc::c_int) -> std::io::Result<()> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.bytes().any(|b| b == 0 || b == b'%')
    {
        return Err(std::io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: ifreq is plain data, for which all zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // `ifru_flags` has 16 bits, and the flags fit into them (if_tun.h).
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | more_flags) & 0xffff;
    request.ifr_ifru.ifru_flags = u16::try_from(flags).unwrap_or_default().cast_signed();
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives across the call.
    let status = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if status < 0 {
        Err(std::io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[allow(unsafe_code)]
fn set(tun: &File, request: libc::Ioctl, value: libc::c_ulong) -> std::io::Result<()> {
    // SAFETY: TUNSETOWNER and TUNSETPERSIST take a number, not a pointer.
    let status = unsafe { libc::ioctl(tun.as_raw_fd(), request, value) };
    if status < 0 {
        Err(std::io::Error::last_os_error())
    } else {
        Ok(())
    }
}
