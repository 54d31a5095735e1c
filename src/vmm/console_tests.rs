use super::*;
use std::io::Write;
use std::os::unix::net::UnixStream;

struct Fixture {
    dir: tempfile::TempDir,
    consoles: Consoles,
    cancel: Cancel,
}

impl Fixture {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            consoles: Consoles::try_new().unwrap(),
            cancel: Cancel::try_new().unwrap(),
        }
    }
    fn attach(&self, mark: &str, bytes_max: u64) -> UnixStream {
        let (ours, guests) = UnixStream::pair().unwrap();
        let dir = self.dir.path().to_owned();
        self.consoles
            .attach(Attach {
                dir,
                bytes_max,
                from: std::os::fd::OwnedFd::from(ours).into(),
                mark: mark.into(),
            })
            .unwrap();
        guests
    }
    fn follow(&self, tail: Option<u64>) -> Follower {
        self.consoles.follow(self.dir.path(), tail).unwrap()
    }
    /// Follows the log until the text that it has received ends with `end`. Returns this text.
    #[track_caller]
    fn until(&self, follower: &mut Follower, end: &str) -> String {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut seen = String::new();
        loop {
            while let Some(text) = follower.next_chunk().unwrap() {
                seen += &text;
            }
            if seen.ends_with(end) {
                return seen;
            }
            assert_eq!(
                follower.wait(deadline, &self.cancel).unwrap(),
                FollowerState::More,
                "{seen:?}"
            );
        }
    }
}

#[test]
fn guest_output_reaches_log_and_followers() {
    let f = Fixture::new();
    let mut early = f.follow(None);
    assert_eq!(early.next_chunk().unwrap(), None);
    let mut guest = f.attach("started x", 1 << 20);
    guest.write_all(b"hello\n").unwrap();
    assert_eq!(
        f.until(&mut early, "hello\n"),
        "--- fcd: started x ---\r\nhello\n"
    );
    let mut late = f.follow(Some(1));
    assert_eq!(f.until(&mut late, "hello\n"), "hello\n");
    guest.write_all(b"world\n").unwrap();
    assert_eq!(f.until(&mut early, "world\n"), "world\n");
    assert_eq!(f.until(&mut late, "world\n"), "world\n");
    assert_eq!(read(f.dir.path(), Some(2)).unwrap(), "hello\nworld\n");
    drop((early, late));
    assert!(f.consoles.shared.state.lock().followers.is_empty());
}

#[test]
fn reattached_console_continues_same_log() {
    let f = Fixture::new();
    let mut follower = f.follow(None);
    let mut guest = f.attach("started", 1 << 20);
    guest.write_all(b"one").unwrap();
    f.until(&mut follower, "one");
    let mut again = f.attach("reconnected", 1 << 20);
    drop(guest);
    again.write_all(b"two\n").unwrap();
    assert_eq!(
        f.until(&mut follower, "two\n"),
        "\r\n--- fcd: reconnected ---\r\ntwo\n"
    );
}

#[test]
fn flood_is_bounded() {
    let f = Fixture::new();
    let mut follower = f.follow(None);
    let mut guest = f.attach("started", 8192);
    let writer = crate::host::thread::spawn("flood", move || {
        for _ in 0..64 {
            guest.write_all(&[b'x'; 16 * 1024]).unwrap();
        }
        guest.write_all(b"\nthe end\n").unwrap();
    })
    .unwrap();
    let seen = f.until(&mut follower, "the end\n");
    writer.join().unwrap();
    assert!(seen.len() <= 64 * 16 * 1024 + 100);
    let sizes: u64 = std::fs::read_dir(f.dir.path())
        .unwrap()
        .map(|e| e.unwrap().metadata().unwrap().len())
        .sum();
    assert!(sizes <= 8192, "{sizes}");
    assert!(read(f.dir.path(), None).unwrap().ends_with("the end\n"));
}

#[test]
fn unwritable_log_blocks_nobody_and_gap_is_marked() {
    let f = Fixture::new();
    let log = f.dir.path().join(super::super::log_file::CURRENT);
    // Even root cannot write to the log because a directory has its name. This acts like a full
    // disk.
    std::fs::create_dir(&log).unwrap();
    let mut guest = f.attach("m", 1 << 20);
    let (probe, mut probe_guest) = UnixStream::pair().unwrap();
    guest.write_all(b"lost\n").unwrap();
    // The thread handles consoles in order. When the other console's line is in its log, the thread
    // has handled this console too.
    let other = tempfile::tempdir().unwrap();
    let mut other_follower = f.consoles.follow(other.path(), None).unwrap();
    let attach = Attach {
        dir: other.path().to_owned(),
        bytes_max: 1 << 20,
        from: std::os::fd::OwnedFd::from(probe).into(),
        mark: "m".into(),
    };
    f.consoles.attach(attach).unwrap();
    for i in 0..3 {
        probe_guest.write_all(format!("{i}\n").as_bytes()).unwrap();
        f.until(&mut other_follower, &format!("{i}\n"));
    }
    std::fs::remove_dir(&log).unwrap();
    let mut follower = f.follow(None);
    guest.write_all(b"kept\n").unwrap();
    let seen = f.until(&mut follower, "kept\n");
    assert_eq!(seen, "--- fcd: 5 bytes could not be written ---\r\nkept\n");
}

#[test]
fn wait_ends_by_cancel_deadline_and_deletion() {
    let f = Fixture::new();
    let follower = f.follow(None);
    assert_eq!(
        follower
            .wait(Instant::now() + Duration::from_millis(5), &f.cancel)
            .unwrap(),
        FollowerState::Deadline
    );
    f.consoles.forget(f.dir.path());
    assert_eq!(
        follower
            .wait(Instant::now() + Duration::from_secs(10), &f.cancel)
            .unwrap(),
        FollowerState::Ended
    );
    f.cancel.cancel(crate::locks::CancelCause::Requested);
    let e = follower
        .wait(Instant::now() + Duration::from_secs(10), &f.cancel)
        .unwrap_err();
    assert_eq!(e.kind(), crate::error::Kind::Cancelled);
}

#[test]
fn characters_are_not_cut() {
    for (bytes, whole) in [
        (&b"abc"[..], 3),
        ("aé".as_bytes(), 3),
        (&"aé".as_bytes()[..2], 1),
        (&"€".as_bytes()[..2], 0),
        (&"x🦀".as_bytes()[..4], 1),
        ("x🦀".as_bytes(), 5),
        (b"\xff\x80\x80\x80", 4),
        (b"", 0),
    ] {
        assert_eq!(whole_characters(bytes), whole, "{bytes:?}");
    }
    let f = Fixture::new();
    let mut follower = f.follow(None);
    let mut guest = f.attach("m", 1 << 20);
    guest.write_all(b"a\xe2\x82").unwrap();
    f.until(&mut follower, "a");
    guest.write_all(b"\xac\n").unwrap();
    assert_eq!(f.until(&mut follower, "\n"), "€\n");
}

#[test]
fn vmm_log_over_its_bound_is_truncated() {
    let f = Fixture::new();
    let path = f.dir.path().join(VMM_LOG);
    let size = || std::fs::metadata(&path).unwrap().len();
    for (bytes, expected) in [
        (VMM_LOG_BYTES_MAX, VMM_LOG_BYTES_MAX),
        (VMM_LOG_BYTES_MAX + 1, 0),
    ] {
        std::fs::write(&path, vec![b'x'; bytes as usize]).unwrap();
        let vmm_log = Some(std::fs::OpenOptions::new().write(true).open(&path).unwrap());
        let (from, _guest) = UnixStream::pair().unwrap();
        let from = std::os::fd::OwnedFd::from(from).into();
        bound_vmm_log(&Console {
            dir: f.dir.path().to_owned(),
            from,
            vmm_log,
        });
        assert_eq!(size(), expected);
    }
}

#[test]
fn followers_leave_nothing() {
    let f = Fixture::new();
    let (first, second) = (f.follow(None), f.follow(None));
    drop(first);
    assert_eq!(f.consoles.shared.state.lock().followers.len(), 1);
    drop(second);
    assert_eq!(f.consoles.shared.state.lock().followers.len(), 0);
}
