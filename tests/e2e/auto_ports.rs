//! Checks of `--publish auto` in a running VM, for both network modes.

use crate::host::{Host, wait_for};
use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);
/// A server in the guest sends this word to each client.
const WORD: &str = "served";

fn unused_port() -> u16 {
    let unused = TcpListener::bind("127.0.0.1:0").unwrap();
    unused.local_addr().unwrap().port()
}

/// Returns what a server at a port of the host's loopback sends, if it sends anything.
fn answer(port: u16) -> Option<String> {
    let mut stream = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).ok()?;
    (!said.is_empty()).then_some(said)
}

/// Starts a server in the guest and returns its process ID.
fn serve(host: &Host, vm: &str, address: &str, port: u16) -> String {
    let server = format!(
        "$s = IO::Socket::INET->new(Listen => 5, LocalAddr => q({address}), LocalPort => {port}, \
         ReuseAddr => 1) or die; while ($c = $s->accept) {{ print $c qq({WORD}); close $c }}"
    );
    let begin = format!("nohup perl -MIO::Socket::INET -e '{server}' >/dev/null 2>&1 & echo $!");
    host.sh(vm, &begin).trim().to_owned()
}

/// Returns the output of `fcctl port` on stdout and stderr.
fn listed(host: &Host, vm: &str) -> (String, String) {
    crate::host::text(&host.fcctl(&["port", vm]))
}

/// Waits until `fcctl port` reports a port that is not forwarded, for a reason with this text.
fn await_report(host: &Host, vm: &str, port: u16, reason: &str) {
    let begin = format!("port {port} is not forwarded: ");
    wait_for("the port is reported", || {
        let (_, notes) = listed(host, vm);
        let mut lines = notes.lines();
        lines
            .any(|line| line.contains(&begin) && line.contains(reason))
            .then_some(())
    });
}

/// Forwards ports of a VM while processes in the guest listen on them.
pub fn forward_follows_listener(host: &Host, vm: &str) {
    assert_eq!(host.ok(&["port", "add", vm, "auto"]), "auto\n");
    let before = listed(host, vm).0;
    let port = unused_port();
    let server = serve(host, vm, "0.0.0.0", port);
    wait_for("the port is forwarded", || {
        answer(port).filter(|word| word == WORD)
    });
    let line = format!("{port}/tcp -> 127.0.0.1:{port}\n");
    assert!(listed(host, vm).0.contains(&line));
    assert!(
        host.ok(&["ps"])
            .contains(&format!("127.0.0.1:{port}->{port}/tcp"))
    );

    // A program on this host has the port, and a server listens on the guest's loopback.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listener.local_addr().unwrap().port();
    serve(host, vm, "0.0.0.0", taken);
    await_report(host, vm, taken, &format!("127.0.0.1:{taken}"));
    let inner = unused_port();
    let local = serve(host, vm, "127.0.0.1", inner);
    await_report(host, vm, inner, "listen on 0.0.0.0");
    assert!(host.ok(&["ps"]).contains(&format!("{inner}/tcp")));
    assert_eq!(answer(inner), None);

    // The server now listens on all addresses.
    host.sh(vm, &format!("kill {local}"));
    serve(host, vm, "0.0.0.0", inner);
    wait_for("the other port is forwarded", || {
        answer(inner).filter(|word| word == WORD)
    });

    host.sh(vm, &format!("kill {server}"));
    wait_for("the port is no longer forwarded", || {
        (!listed(host, vm).0.contains(&line)).then_some(())
    });
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
    assert!(
        host.ok(&["port", "rm", vm, "auto"])
            .ends_with("removed auto\n")
    );
    assert_eq!(listed(host, vm).0 + "auto\n", before);
    assert!(TcpStream::connect(("127.0.0.1", inner)).is_err());
}
