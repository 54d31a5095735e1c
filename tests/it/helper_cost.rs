//! Measures the cost of a helper process per connection. `scripts/bench helper` runs it.

use fcd::testing::error::Result;
use fcd::testing::guest::io::BytesSource;
use fcd::testing::guest::ssh::in_process::InProcess;
use fcd::testing::guest::{ExecSpec, Sink, Source, SshTransport, Streams, Target, Transport};
use fcd::testing::host::confine;
use fcd::testing::locks::Cancel;
use ssh_key::{Algorithm, LineEnding, PrivateKey, rand_core::OsRng};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const STREAM_BYTES: usize = 256 * 1024 * 1024;

struct Sshd {
    child: Child,
    target: Target,
    _dir: tempfile::TempDir,
}

impl Sshd {
    fn start() -> Self {
        confine::set_program(env!("CARGO_BIN_EXE_fcd"));
        let dir = tempfile::tempdir().unwrap();
        let [host, client] =
            [(); 2].map(|()| PrivateKey::random(&mut OsRng, Algorithm::Ed25519).unwrap());
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            path.display().to_string()
        };
        let host_key = file("host", &host.to_openssh(LineEnding::LF).unwrap());
        let authorized = file("authorized", &client.public_key().to_openssh().unwrap());
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let config = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {host_key}\nAuthorizedKeysFile {authorized}\nStrictModes no\nUsePAM no\n\
             PidFile none\nPermitRootLogin yes\n"
        );
        let config = file("config", &config);
        if nix::unistd::getuid().is_root() {
            std::fs::create_dir_all("/run/sshd").unwrap();
        }
        let child = Command::new("/usr/sbin/sshd")
            .args(["-D", "-f", &config])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        while TcpStream::connect(addr).is_err() {
            std::thread::sleep(Duration::from_millis(10));
        }
        let user = nix::unistd::User::from_uid(nix::unistd::getuid())
            .unwrap()
            .unwrap()
            .name;
        let owner = nix::unistd::geteuid()
            .is_root()
            .then_some(fcd::testing::host::Credentials {
                uid: 1_900_000_078,
                gid: 1_900_000_078,
            });
        let private_key = client.to_openssh(LineEnding::LF).unwrap().to_string();
        let target = Target {
            addr,
            user,
            private_key,
            host_key: host.public_key().to_bytes().unwrap(),
            owner,
        };
        Self {
            child,
            target,
            _dir: dir,
        }
    }

    fn exec(&self, transport: &dyn Transport, stdin: &mut dyn Source) -> Result<Duration> {
        let spec = ExecSpec {
            command: "exec cat >/dev/null".into(),
            idle: Some(Duration::from_secs(60)),
            ..ExecSpec::default()
        };
        let begun = Instant::now();
        let streams = Streams {
            stdin: Some(stdin),
            stderr: Some(&mut Nothing),
            ..Streams::default()
        };
        transport.exec(&self.target, &spec, streams, &Cancel::try_new().unwrap())?;
        Ok(begun.elapsed())
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Nothing;

impl Sink for Nothing {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }
}

/// A source that hashes its bytes, as an import does. Both sides of the comparison use it.
struct Hashed {
    left: usize,
    digest: sha2::Sha256,
}

impl Source for Hashed {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = buffer.len().min(self.left);
        buffer[..n].fill(7);
        sha2::Digest::update(&mut self.digest, &buffer[..n]);
        self.left -= n;
        Ok(n)
    }
}

fn median(mut took: Vec<Duration>) -> Duration {
    took.sort();
    took[took.len() / 2]
}

#[test]
#[ignore = "measures: scripts/bench helper"]
fn bench() {
    let rounds: usize =
        std::env::var("FCD_BENCH_ROUNDS").map_or(100, |n| n.parse().expect("a number"));
    let sshd = Sshd::start();
    let mut before = Vec::new();
    let mut after = Vec::new();
    for _ in 0..rounds {
        before.push(sshd.exec(&InProcess, &mut BytesSource::new("")).unwrap());
        after.push(sshd.exec(&SshTransport, &mut BytesSource::new("")).unwrap());
    }
    let (before, after) = (median(before), median(after));
    println!(
        "exec, p50 of {rounds}: in process {before:?}, in a helper {after:?}, {:?} more",
        after.saturating_sub(before)
    );
    let mut before = Vec::new();
    let mut after = Vec::new();
    let stream = || Hashed {
        left: STREAM_BYTES,
        digest: sha2::Digest::new(),
    };
    for _ in 0..rounds.div_ceil(10) {
        before.push(sshd.exec(&InProcess, &mut stream()).unwrap());
        after.push(sshd.exec(&SshTransport, &mut stream()).unwrap());
    }
    let rate = |took: Duration| STREAM_BYTES as f64 / took.as_secs_f64() / 1e6;
    let (before, after) = (rate(median(before)), rate(median(after)));
    println!(
        "stream, p50: in process {before:.0} MB/s, in a helper {after:.0} MB/s, {:.2} of it",
        after / before
    );
}
