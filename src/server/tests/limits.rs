use super::*;
use crate::host::{Command, command::run_any_status};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

fn short() -> Limits {
    Limits {
        line: Duration::from_millis(150),
        ..Limits::default()
    }
}

#[test]
fn incomplete_line_times_out() {
    let f = fixture_with(short());
    let mut c = f.client();
    c.check_alive();
    let begun = Instant::now();
    c.send("{\"jsonrpc\":");
    assert_eq!(c.answer().kind(), (-32600, "invalid_request"));
    c.check_closed();
    assert!(begun.elapsed() >= short().line);
}

#[test]
fn slowly_arriving_line_times_out() {
    let f = fixture_with(short());
    let mut c = f.client();
    let begun = Instant::now();
    // Sends one byte at a time as long as the server accepts it. The read timeout paces the bytes.
    c.stream()
        .set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    let mut line = String::new();
    let ended = loop {
        if c.stream().write_all(b"x").is_err() || begun.elapsed() > DEADLINE {
            break false;
        }
        match c.reader.read_line(&mut line) {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            r => break r.unwrap() > 0,
        }
    };
    assert!(ended && line.contains("invalid_request"), "{line:?}");
    assert!(begun.elapsed() >= short().line && begun.elapsed() < DEADLINE);
}

#[test]
fn idle_connection_is_closed_but_not_during_call() {
    let f = fixture_with(Limits {
        idle: Duration::from_millis(100),
        line: Duration::from_millis(50),
        ..Limits::default()
    });
    let (mut idle, mut held) = (f.client(), f.client());
    held.send("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"hold\"}\n");
    assert_eq!(held.answer().method.as_deref(), Some("log"));
    let begun = Instant::now();
    idle.check_alive();
    idle.check_closed();
    assert!(
        begun.elapsed() >= Duration::from_millis(100),
        "the connection was closed before the idle limit"
    );
    until(|| f.server.connections() == 1);
    assert_eq!(f.probe.hung_up.load(Ordering::SeqCst), 0);
}

#[test]
fn caller_that_does_not_read_is_dropped() {
    let f = fixture_with(Limits {
        write_stall: Duration::from_millis(100),
        ..Limits::default()
    });
    let mut c = f.client();
    c.send("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"flood\",\"more\":true}\n");
    f.client().check_alive();
    until(|| f.probe.hung_up.load(Ordering::SeqCst) > 0);
    // Earlier output can still be read. The connection ends in the middle of a line.
    let mut rest = Vec::new();
    c.reader.read_to_end(&mut rest).unwrap();
    assert!(!rest.ends_with(b"\n"));
    assert_eq!(f.server.drain(Instant::now() + DEADLINE), 0);
}

#[test]
fn connection_above_limit_gets_error_line() {
    let limits = |all, per_uid, reserved| Limits {
        connections_max: all,
        connections_per_uid_max: per_uid,
        connections_root_reserved: reserved,
        ..Limits::default()
    };
    for limits in [limits(3, 9, 0), limits(9, 3, 0)] {
        let f = fixture_with(limits);
        let mut first: Vec<_> = (0..3).map(|_| f.client()).collect();
        first.iter_mut().for_each(Client::check_alive);
        let mut refused = f.client();
        let answer = refused.answer();
        assert_eq!(
            (answer.kind(), &answer.id),
            ((-32000, "connection_limit"), &Value::Null)
        );
        assert!(answer.error.unwrap().data.unwrap().retryable);
        refused.check_closed();
        first.pop();
        // The slot is free when the connection's thread has seen the end.
        until(|| f.server.connections() < 3);
        f.client().check_alive();
        first.iter_mut().for_each(Client::check_alive);
    }
}

#[test]
fn connections_are_reserved_for_root() {
    let limits = Limits {
        connections_max: 3,
        connections_root_reserved: 2,
        ..Limits::default()
    };
    let registry = Arc::new(Registry::new(limits));
    let socket = Arc::new(UnixStream::pair().unwrap().0);
    let enter = |uid| registry.enter(&socket, uid).map_err(|e| e.kind());
    let _first = enter(1000).unwrap();
    assert_eq!(enter(1000).map(drop), Err(Kind::ConnectionLimit));
    let roots = [enter(0).unwrap(), enter(0).unwrap()];
    assert_eq!(enter(0).map(drop), Err(Kind::ConnectionLimit));
    drop(roots);
    assert_eq!(registry.len(), 1);
}

pub(super) fn raise_descriptor_limit() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert!(
        hard >= 3000,
        "these tests need 3000 descriptors: ulimit -Hn"
    );
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

pub(super) fn roomy() -> Limits {
    Limits {
        connections_max: 2000,
        connections_per_uid_max: 2000,
        ..Limits::default()
    }
}

#[test]
fn others_are_served_with_thousand_idle_connections() {
    raise_descriptor_limit();
    let f = fixture_with(roomy());
    let mut idle: Vec<_> = (0..1000).map(|_| f.client()).collect();
    for _ in 0..20 {
        let mut c = f.client();
        (0..20).for_each(|_| c.check_alive());
    }
    idle.iter_mut().step_by(100).for_each(Client::check_alive);
    assert!(f.server.connections() >= 1000);
    drop(idle);
    assert_eq!(f.server.drain(Instant::now() + DEADLINE), 0);
}

/// Runs only as a child process, because it uses up the descriptors of its process.
#[test]
#[ignore = "run by callers_without_descriptors_get_error_line"]
fn child_without_descriptors() {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
    let f = fixture();
    f.client().check_alive();
    assert_eq!(f.server.drain(Instant::now() + DEADLINE), 0);
    let sockets: Vec<_> = (0..4)
        .map(|_| {
            socket(
                AddressFamily::Unix,
                SockType::Stream,
                SockFlag::SOCK_CLOEXEC,
                None,
            )
            .unwrap()
        })
        .collect();
    let mut fill: Vec<_> = std::iter::repeat_with(|| std::fs::File::open("/dev/null"))
        .map_while(Result::ok)
        .collect();
    let connected = |socket: OwnedFd| {
        connect(socket.as_raw_fd(), &UnixAddr::new(&f.path).unwrap()).unwrap();
        let stream = UnixStream::from(socket);
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Client {
            reader: BufReader::new(stream),
        }
    };
    for (n, socket) in sockets.into_iter().enumerate() {
        let mut c = connected(socket);
        let answer = c.answer();
        assert_eq!(answer.kind(), (-32000, "connection_limit"));
        c.check_closed();
        // Keep the client's own descriptor in use.
        fill.push(std::fs::File::from(OwnedFd::from(c.reader.into_inner())));
        assert_eq!(f.server.connections(), 0, "after {n}");
    }
    drop(fill);
    f.client().check_alive();
    println!("\nreported and recovered");
}

#[test]
fn callers_without_descriptors_get_error_line() {
    let test = "server::tests::limits::child_without_descriptors";
    let script = format!("ulimit -n 64 && exec \"$0\" --exact {test} --ignored --nocapture");
    let child = Command::new("sh")
        .args(["-c", &script])
        .arg(std::env::current_exe().unwrap());
    let out = run_any_status(&child, &Cancel::try_new().unwrap(), &mut |_| {}).unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(
        text.contains("reported and recovered"),
        "{text}{}",
        String::from_utf8_lossy(&out.stderr)
    );
}
