//! `vm connect`: relays this process's stdin and stdout to a port in the guest.

use super::context::Context;
use super::relay::write_patiently;
use crate::api::vm::{VmConnect, VmConnectRequest};
use crate::client::Result;
use crate::error::Error;
use crate::host::thread;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

const PIECE_BYTES: usize = 64 * 1024;

#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Name, ID, or ID prefix
    vm: String,
    /// vsock port of the guest
    port: u32,
}

/// Relays until the guest closes its side. The end of stdin is not forwarded: Firecracker treats a
/// half-closed connection as closed, so whatever the guest has not sent yet would be lost (v1.16,
/// src/vmm/src/devices/virtio/vsock/csm/connection.rs).
pub(super) fn run(ctx: &mut Context, args: Args) -> Result<u8> {
    let Context {
        connector,
        printer,
        stdio,
        ..
    } = ctx;
    let request = VmConnectRequest {
        vm: args.vm,
        port: args.port,
    };
    let (_, socket) = connector
        .connect(printer)?
        .call_for_fd::<VmConnect>(&request)?;
    let socket = UnixStream::from(socket);
    let dup = |file: &File| {
        file.try_clone()
            .map_err(|e| Error::io("duplicate a stream", e))
    };
    let (stdin, to) = (
        dup(&stdio.stdin)?,
        socket
            .try_clone()
            .map_err(|e| Error::io("duplicate a stream", e))?,
    );
    // Never joined: input that is still unread when the guest closes its side is dropped.
    thread::spawn("stdin", move || send(stdin, &to))?;
    receive(socket, dup(&stdio.stdout)?)?;
    Ok(0)
}

/// Copies stdin until its end, or until the guest hangs up.
pub(super) fn send(mut stdin: File, mut to: impl Write) {
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        match stdin.read(&mut piece) {
            Ok(n @ 1..) if to.write_all(&piece[..n]).is_ok() => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Ok(_) | Err(_) => return,
        }
    }
}

/// Copies what the guest sends until it hangs up.
pub(super) fn receive(mut from: impl Read, mut to: File) -> Result<()> {
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        match from.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(n) => match write_patiently(&mut to, &piece[..n]) {
                // The reader of stdout has exited. That is not an error.
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                other => other.map_err(|e| Error::io("write to stdout", e))?,
            },
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io("read from the guest", e).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Start, check, fcctl_from, file_with, two_vms, vm};
    use crate::api::vm::VmState;
    use crate::client::fake::Fake;
    use crate::error::{Error, Kind};
    use expect_test::expect;
    use serde_json::json;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    /// Starts a daemon whose guest reads `len` bytes, sends them back in reverse order and hangs
    /// up.
    fn backwards(len: usize) -> Fake {
        Fake::start(move |r| {
            let (ours, mut guests) = UnixStream::pair().unwrap();
            r.result_with(json!({"vm": vm("web", VmState::Running)}), &ours.into());
            let mut got = vec![0; len];
            guests.read_exact(&mut got).unwrap();
            got.reverse();
            guests.write_all(&got).unwrap();
        })
    }

    #[test]
    fn connect_relays_both_ways_until_guest_hangs_up() {
        let fake = backwards(1 << 20);
        let sent: Vec<u8> = (0..1 << 20).map(|i: u32| (i % 251) as u8).collect();
        let ran = fcctl_from(
            &fake,
            Start {
                stdin: file_with(&sent),
                ..Start::default()
            },
            &["vm", "connect", "web", "5000"],
        );
        assert_eq!((ran.status, ran.err.as_str()), (0, ""));
        assert!(ran.out.iter().rev().eq(&sent));
        assert_eq!(fake.calls(), [r#"vm.connect {"port":5000,"vm":"web"}"#]);
    }

    #[test]
    fn connect_refusal_shows_cause() {
        let refuses = Fake::start(|r| {
            r.fault(
                Error::new(Kind::GuestUnavailable, "connect to VM web: nothing").hint("start it"),
            )
        });
        check(
            &refuses,
            &["vm", "connect", "web", "1"],
            expect![[r#"
                > vm.connect {"port":1,"vm":"web"}
                ! fcctl: connect to VM web: nothing
                ! hint: start it
                status 1
            "#]],
        );
        // The reply must carry a descriptor.
        check(
            &two_vms(),
            &["vm", "connect", "web", "1"],
            expect![[r#"
            > vm.connect {"port":1,"vm":"web"}
            ! fcctl: vm.connect: no descriptor came with the answer
            status 1
        "#]],
        );
    }
}
