//! Creates the socket file. Only root and this process's user may be able to write to its
//! directory. The socket never replaces a file that is in use or belongs to somebody else.
//!
//! If systemd listens on the path and has passed its socket (`fcd.socket`), the server uses that
//! socket and never removes its file. Callers who connect while the daemon restarts then wait for
//! the next daemon.

use crate::error::{Error, Kind, Result};
use crate::host::command::{Command, run_any_status};
use crate::locks::Cancel;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use rustix::fs::{AtFlags, CWD, FileType, Mode};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The group whose members may use the socket of root's daemon.
const SOCKET_GROUP: &str = "fcd";
/// How long the name service may take to look up the group.
const GETENT_DEADLINE: Duration = Duration::from_secs(10);
/// The exit status of getent(1) if a key was not found.
const GETENT_NOT_FOUND: i32 = 2;

/// A listening socket and its file.
pub(super) struct Socket {
    pub(super) listener: UnixListener,
    /// The file to remove at the end, unless it is systemd's.
    _file: Option<SocketFile>,
}

struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for SocketFile {
    /// Removes the file unless another daemon has replaced it.
    fn drop(&mut self) {
        crate::locks::may_block("file access");
        if inode(&self.path).is_ok_and(|found| found == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> std::io::Result<(u64, u64)> {
    crate::locks::may_block("file access");
    let stat = rustix::fs::lstat(path)?;
    Ok((stat.st_dev, stat.st_ino))
}

pub(super) fn bind(path: &Path) -> Result<Socket> {
    crate::locks::may_block("file access");
    let shown = path.display();
    let dir = path.parent().filter(|d| !d.as_os_str().is_empty());
    let dir = dir.ok_or_else(|| {
        Error::invalid(format!("socket {shown} has no directory")).hint("use an absolute path")
    })?;
    make_dir(dir)?;
    check_dir(dir)?;
    remove_stale(path)?;
    let listener = UnixListener::bind(path).map_err(|e| {
        let too_long = e.kind() == std::io::ErrorKind::InvalidInput;
        let error = Error::io(format!("listen on {shown}"), e);
        if too_long {
            error.hint("use a shorter --socket: a socket's path has at most 107 bytes")
        } else {
            error
        }
    })?;
    let doing = |e| Error::io(format!("set the mode and group of socket {shown}"), e);
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660)).map_err(doing)?;
    if rustix::process::geteuid().is_root()
        && let Some(gid) = socket_gid()
    {
        std::os::unix::fs::lchown(path, None, Some(gid)).map_err(doing)?;
    }
    listener.set_nonblocking(true).map_err(doing)?;
    let inode = inode(path).map_err(doing)?;
    Ok(Socket {
        listener,
        _file: Some(SocketFile {
            path: path.to_owned(),
            inode,
        }),
    })
}

/// Returns the socket for this path that systemd has passed, if it has.
pub(super) fn of_systemd(
    path: &Path,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Option<Socket>> {
    let mut others = 0;
    for fd in crate::host::inherited::passed_descriptors(env) {
        if !is_listening(&fd) {
            continue;
        }
        let listener = UnixListener::from(fd);
        if !listener.local_addr().is_ok_and(|at| is_at(&at, path)) {
            others += 1;
            continue;
        }
        listener
            .set_nonblocking(true)
            .map_err(|e| Error::io(format!("use systemd's socket {}", path.display()), e))?;
        return Ok(Some(Socket {
            listener,
            _file: None,
        }));
    }
    if others > 0 {
        log::warn!(
            "systemd passed a socket, but not one for {}: set ListenStream= of fcd.socket and `socket` of the configuration to the same path",
            path.display()
        );
    }
    Ok(None)
}

fn is_listening(fd: &OwnedFd) -> bool {
    rustix::net::sockopt::socket_acceptconn(fd).unwrap_or(false)
        && rustix::net::sockopt::socket_domain(fd) == Ok(rustix::net::AddressFamily::UNIX)
}

/// True if both name the same file. `/run` may also be called `/var/run`.
fn is_at(address: &std::os::unix::net::SocketAddr, path: &Path) -> bool {
    let Some(at) = address.as_pathname() else {
        return false;
    };
    at == path || matches!((at.canonicalize(), path.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// Looks up the group whose members may connect. If that fails, logs the reason, and only root can
/// connect.
fn socket_gid() -> Option<u32> {
    gid_of(SOCKET_GROUP).unwrap_or_else(|e| {
        log::warn!("look up group {SOCKET_GROUP}, whose members may use the socket: {e}");
        None
    })
}

/// Runs getent(1) in another process, because the name service may load third-party modules, and
/// the daemon would keep them in memory. Returns `None` if there is no such group.
fn gid_of(group: &str) -> Result<Option<u32>> {
    let command = Command::new("getent")
        .args(["group", group])
        .deadline(GETENT_DEADLINE);
    let cancel = Cancel::try_new().map_err(|e| Error::io("make an eventfd", e))?;
    let output = run_any_status(&command, &cancel, &mut |_| {})?;
    match output.status {
        0 => Ok(gid_in(&output.stdout)),
        GETENT_NOT_FOUND => Ok(None),
        status => Err(Error::new(
            Kind::CommandFailed,
            format!("getent failed with status {status}"),
        )),
    }
}

/// Parses the gid, which is the third field of a line as in group(5).
fn gid_in(line: &[u8]) -> Option<u32> {
    std::str::from_utf8(line)
        .ok()?
        .split(':')
        .nth(2)?
        .parse()
        .ok()
}

/// Creates the directory. Root's directory is readable by everybody, because the socket's mode
/// restricts access. A user's directory is private.
fn make_dir(dir: &Path) -> Result<()> {
    crate::locks::may_block("file access");
    let mode = if rustix::process::geteuid().is_root() {
        0o755
    } else {
        0o700
    };
    match rustix::fs::mkdirat(CWD, dir, Mode::from_raw_mode(mode)) {
        // The umask may have removed bits.
        Ok(()) => std::fs::set_permissions(dir, std::fs::Permissions::from_mode(mode))
            .map_err(|e| Error::io(format!("set the mode of {}", dir.display()), e)),
        Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(e) => Err(Error::io(format!("create directory {}", dir.display()), e)
            .hint(format!("mkdir -p {}", dir.display()))),
    }
}

/// Checks that only root and this process's user can replace files in the directory.
fn check_dir(dir: &Path) -> Result<()> {
    crate::locks::may_block("file access");
    let shown = dir.display();
    let stat = rustix::fs::stat(dir).map_err(|e| Error::io(format!("stat {shown}"), e))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Err(
            Error::new(Kind::Host, format!("{shown} is not a directory"))
                .hint("use another --socket"),
        );
    }
    let ours = stat.st_uid == 0 || stat.st_uid == rustix::process::geteuid().as_raw();
    let sticky = stat.st_mode & 0o1000 != 0;
    if !ours || (stat.st_mode & 0o022 != 0 && !sticky) {
        let text = format!("other users could replace a socket in {shown}");
        return Err(Error::new(Kind::Host, text)
            .hint(format!("chmod go-w {shown}, or use another --socket")));
    }
    Ok(())
}

/// Removes a socket of this user if nothing listens on it. Fails for any other file.
fn remove_stale(path: &Path) -> Result<()> {
    crate::locks::may_block("file access");
    let shown = path.display();
    let stat = match rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(rustix::io::Errno::NOENT) => return Ok(()),
        Err(e) => return Err(Error::io(format!("stat {shown}"), e)),
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket
        || stat.st_uid != rustix::process::geteuid().as_raw()
    {
        let text = format!("{shown} exists and is not a socket of this user");
        return Err(Error::new(Kind::TargetExists, text).hint(format!(
            "look at it with stat {shown}, or use another --socket"
        )));
    }
    if is_listened_on(path)? {
        let text = format!("another process listens on {shown}");
        return Err(Error::new(Kind::Busy, text).hint(format!("find it with ss -xlp src {shown}")));
    }
    std::fs::remove_file(path).map_err(|e| Error::io(format!("remove stale socket {shown}"), e))
}

fn is_listened_on(path: &Path) -> Result<bool> {
    let doing = |e: nix::Error| {
        Error::io(
            format!("check whether something listens on {}", path.display()),
            e,
        )
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(doing)?;
    match connect(probe.as_raw_fd(), &UnixAddr::new(path).map_err(doing)?) {
        Err(nix::errno::Errno::ECONNREFUSED | nix::errno::Errno::ENOENT) => Ok(false),
        // EAGAIN means that something listens, but its backlog is full.
        Ok(()) | Err(nix::errno::Errno::EAGAIN) => Ok(true),
        Err(e) => Err(doing(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gid_matches_host_name_service() {
        assert_eq!(gid_of("root").unwrap(), Some(0));
        assert_eq!(gid_of("no-such-group").unwrap(), None);
    }

    #[test]
    fn gid_is_read_from_third_field() {
        assert_eq!(gid_in(b"fcd:x:990:alice,bob\n"), Some(990));
        assert_eq!(gid_in(b"fcd:x:-1:"), None);
        assert_eq!(gid_in(b""), None);
    }
}
