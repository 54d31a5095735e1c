use super::*;
use crate::error::Result;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;

fn bind(path: &Path) -> Result<Server> {
    Server::bind(path, Limits::default(), Arc::new(Probe::default()))
}

/// Checks that the server refuses to replace the file at the socket's path.
#[track_caller]
fn check_refused(put: impl FnOnce(&Path), kind: Kind) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.sock");
    put(&path);
    let before = path
        .symlink_metadata()
        .map(|m| (m.ino(), m.mtime_nsec(), m.len()))
        .ok();
    let e = bind(&path).map(drop).unwrap_err();
    assert_eq!(e.kind(), kind, "{e:?}");
    assert!(e.hint_text().is_some());
    assert_eq!(
        path.symlink_metadata()
            .map(|m| (m.ino(), m.mtime_nsec(), m.len()))
            .ok(),
        before
    );
}

#[test]
fn socket_file_is_created_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run/fcd.sock");
    let server = bind(&path).unwrap();
    let mode = |p: &Path| p.metadata().unwrap().permissions().mode() & 0o7777;
    assert!(path.symlink_metadata().unwrap().file_type().is_socket());
    let dir_mode = if rustix::process::geteuid().is_root() {
        0o755
    } else {
        0o700
    };
    assert_eq!(
        (mode(&path), mode(path.parent().unwrap())),
        (0o660, dir_mode)
    );
    drop(server);
    assert!(!path.exists());
}

#[test]
fn stale_socket_file_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let f = Fixture {
        path: path.clone(),
        server: bind(&path).unwrap(),
        probe: Arc::default(),
        _dir: dir,
    };
    f.client().check_alive();
}

#[test]
fn socket_file_of_successor_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.sock");
    let first = bind(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let second = bind(&path).unwrap();
    drop(first);
    assert!(path.exists());
    drop(second);
}

#[test]
fn socket_file_in_use_or_not_ours_is_rejected() {
    let mut keep = Vec::new();
    check_refused(|p| keep.push(UnixListener::bind(p).unwrap()), Kind::Busy);
    check_refused(
        |p| std::fs::write(p, "precious").unwrap(),
        Kind::TargetExists,
    );
    check_refused(|p| std::fs::create_dir(p).unwrap(), Kind::TargetExists);
    check_refused(|p| symlink("/etc/passwd", p).unwrap(), Kind::TargetExists);
    check_refused(
        |p| symlink(p.with_extension("nowhere"), p).unwrap(),
        Kind::TargetExists,
    );
    let foreign = |p: &Path| {
        drop(UnixListener::bind(p).unwrap());
        std::os::unix::fs::lchown(p, Some(4321), None).unwrap();
    };
    check_refused(foreign, Kind::TargetExists);
}

#[test]
fn socket_with_full_backlog_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.sock");
    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
    };
    let make = || {
        socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_NONBLOCK,
            None,
        )
        .unwrap()
    };
    let listener = make();
    bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let clients: Vec<_> = (0..9).map(|_| make()).collect();
    let full = clients.iter().any(|c| {
        connect(c.as_raw_fd(), &UnixAddr::new(&path).unwrap()) == Err(nix::errno::Errno::EAGAIN)
    });
    assert!(full);
    assert_eq!(
        super::socket_file::bind(&path)
            .map(drop)
            .unwrap_err()
            .kind(),
        Kind::Busy
    );
}

#[test]
fn directory_writable_by_others_is_rejected() {
    let dir = tempfile::tempdir().unwrap();
    let set =
        |mode| std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(mode)).unwrap();
    let path = dir.path().join("s.sock");
    for mode in [0o777, 0o775] {
        set(mode);
        assert_eq!(bind(&path).map(drop).unwrap_err().kind(), Kind::Host);
    }
    set(0o1777);
    bind(&path).unwrap();
    set(0o755);
    std::os::unix::fs::chown(dir.path(), Some(4321), None).unwrap();
    assert_eq!(bind(&path).map(drop).unwrap_err().kind(), Kind::Host);
}

#[test]
fn too_long_socket_path_has_hint() {
    let dir = tempfile::tempdir().unwrap();
    let e = bind(&dir.path().join("s".repeat(120)))
        .map(drop)
        .unwrap_err();
    assert!(e.hint_text().unwrap().contains("107 bytes"), "{e:?}");
    assert!(
        bind(&dir.path().join("a/b/s.sock"))
            .map(drop)
            .unwrap_err()
            .hint_text()
            .unwrap()
            .starts_with("mkdir -p")
    );
}
