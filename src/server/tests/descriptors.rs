use super::*;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::io::IoSlice;

pub(super) fn send_with(stream: &UnixStream, bytes: &[u8], fds: &[&OwnedFd]) {
    let fds: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
    let control = [ControlMessage::ScmRights(&fds)];
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(bytes)],
        &control,
        MsgFlags::empty(),
        None,
    )
    .unwrap();
    assert_eq!(sent, bytes.len());
}

/// Returns the read end of a pipe that contains `text`, and its write end.
fn pipe_with(text: &str) -> (OwnedFd, OwnedFd) {
    let (read_end, write_end) = nix::unistd::pipe().unwrap();
    nix::unistd::write(&write_end, text.as_bytes()).unwrap();
    (read_end, write_end)
}

/// Checks that no read end of this pipe is open.
#[track_caller]
fn check_closed(write_end: &OwnedFd) {
    let mut fds = [nix::poll::PollFd::new(
        std::os::fd::AsFd::as_fd(write_end),
        nix::poll::PollFlags::empty(),
    )];
    nix::poll::poll(&mut fds, DEADLINE.as_millis() as u16).unwrap();
    assert!(
        fds[0]
            .revents()
            .unwrap()
            .contains(nix::poll::PollFlags::POLLERR),
        "a read end is still open"
    );
}

fn call(id: u32, method: &str) -> Vec<u8> {
    format!(
        "{}\n",
        json!({"jsonrpc": "2.0", "id": id, "method": method})
    )
    .into_bytes()
}

#[test]
fn descriptors_come_with_their_request() {
    let f = fixture();
    let mut c = f.client();
    for count in 1..=FDS_MAX {
        let (read_end, write_end) = pipe_with("hello");
        send_with(c.stream(), &call(7, "fds"), &vec![&read_end; count]);
        drop(read_end);
        // The handler reads to the end of the file.
        drop(write_end);
        assert_eq!(
            c.answer().result,
            json!({"count": count, "cloexec": true, "text": "hello"})
        );
    }
    assert_eq!(
        c.call("fds", json!({})).result["count"],
        json!(0),
        "descriptors are not kept for the next request"
    );
}

#[test]
fn descriptors_of_pipelined_requests_do_not_mix() {
    let f = fixture();
    let mut c = f.client();
    let ((a, aw), (b, bw)) = (pipe_with("a"), pipe_with("b"));
    c.send(call(1, "fds"));
    send_with(c.stream(), &call(2, "fds"), &[&a]);
    send_with(c.stream(), &call(3, "fds"), &[&b, &b]);
    c.send(call(4, "fds"));
    drop((aw, bw));
    let answers: Vec<_> = (0..4)
        .map(|_| c.answer().result)
        .map(|r| (r["count"].clone(), r["text"].clone()))
        .collect();
    let expected = [(0, ""), (1, "a"), (2, "b"), (0, "")].map(|(n, t)| (json!(n), json!(t)));
    assert_eq!(answers, expected);
}

#[test]
fn too_many_descriptors_are_rejected_and_closed() {
    let f = fixture();
    let mut c = f.client();
    for count in [FDS_MAX + 1, FDS_MAX + 2, 100, 250] {
        let (read_end, write_end) = pipe_with("x");
        send_with(c.stream(), &call(7, "fds"), &vec![&read_end; count]);
        drop(read_end);
        let a = c.answer();
        assert_eq!((a.kind(), &a.id), ((-32600, "invalid_request"), &json!(7)));
        check_closed(&write_end);
        c.check_alive();
    }
    assert_eq!(
        f.probe.calls.load(Ordering::SeqCst),
        4,
        "only check_alive reaches the handler"
    );
}

#[test]
fn descriptors_within_request_are_rejected_and_closed() {
    let f = fixture();
    let mut c = f.client();
    let (read_end, write_end) = pipe_with("x");
    let line = call(7, "fds");
    // The line is longer than one read, so that the first part has been received when the rest is
    // sent.
    let long = format!(
        "{}{}",
        " ".repeat(300_000),
        String::from_utf8(line).unwrap()
    );
    c.send(&long.as_bytes()[..300_004]);
    send_with(c.stream(), &long.as_bytes()[300_004..], &[&read_end]);
    drop(read_end);
    assert_eq!(c.answer().kind(), (-32600, "invalid_request"));
    check_closed(&write_end);
    c.check_alive();
}

#[test]
fn unexpected_descriptors_are_rejected_and_closed() {
    let f = fixture();
    let mut c = f.client();
    for method in ["nofds", "no.such", "panic"] {
        let (read_end, write_end) = pipe_with("x");
        send_with(c.stream(), &call(7, method), &[&read_end]);
        drop(read_end);
        assert!(c.answer().error.is_some());
        check_closed(&write_end);
    }
    assert_eq!(c.call("nofds", json!({})).result, json!(0));
}

#[test]
fn descriptors_of_incomplete_line_are_closed() {
    let f = fixture();
    let mut c = f.client();
    let (read_end, write_end) = pipe_with("x");
    send_with(c.stream(), b"{\"half", &[&read_end]);
    drop(read_end);
    drop(c);
    check_closed(&write_end);
}
