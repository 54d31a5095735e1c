//! A real sshd on the loopback interface for unit tests: `Sshd::start()`, then `sshd.target()`.

use crate::guest::Target;
use ssh_key::{Algorithm, LineEnding, PrivateKey, rand_core::OsRng};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Stdio};

pub struct Sshd {
    child: Option<Child>,
    dir: tempfile::TempDir,
    target: Target,
}

fn key() -> PrivateKey {
    PrivateKey::random(&mut OsRng, Algorithm::Ed25519).expect("a key")
}

impl Sshd {
    /// Starts sshd. It may take a moment until it listens.
    pub fn start() -> Self {
        Self::start_with("")
    }

    /// Starts sshd with additional lines for sshd_config(5).
    pub fn start_with(config: &str) -> Self {
        let mut sshd = Self::prepare(config);
        sshd.launch();
        sshd
    }

    /// Prepares everything except the process.
    pub fn prepare(config: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let (host, client) = (key(), key());
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).expect("write");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("chmod");
            path.display().to_string()
        };
        let host_key = file("host", &host.to_openssh(LineEnding::LF).expect("encode"));
        let authorized = file(
            "authorized",
            &client.public_key().to_openssh().expect("encode"),
        );
        // The port is free now, and nothing else on this machine is likely to take it.
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|l| l.local_addr())
            .expect("a port")
            .port();
        file(
            "config",
            &format!(
                "Port {port}\nListenAddress 127.0.0.1\nHostKey {host_key}\nAuthorizedKeysFile {authorized}\nStrictModes no\n\
                 UsePAM no\nPidFile none\nPermitRootLogin yes\nMaxStartups 100\n{config}\n"
            ),
        );
        // sshd requires its privilege separation directory (Debian: /run/sshd), which only root can
        // create.
        if nix::unistd::getuid().is_root() {
            std::fs::create_dir_all("/run/sshd").expect("make /run/sshd");
        }
        let user = nix::unistd::User::from_uid(nix::unistd::getuid())
            .ok()
            .flatten()
            .expect("a user")
            .name;
        let target = Target {
            addr: SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            user,
            private_key: client
                .to_openssh(LineEnding::LF)
                .expect("encode")
                .to_string(),
            host_key: host.public_key().to_bytes().expect("encode"),
            owner: None,
        };
        Self {
            child: None,
            dir,
            target,
        }
    }

    #[allow(clippy::disallowed_methods)] // host::command waits for the end of a command; this server keeps running.
    pub fn launch(&mut self) {
        let sshd = std::process::Command::new("/usr/sbin/sshd")
            .args(["-D", "-e", "-f"])
            .arg(self.dir.path().join("config"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(self.dir.path().join("log")).expect("a log"))
            .spawn()
            .expect("start /usr/sbin/sshd (apt-get install openssh-server)");
        self.child = Some(sshd);
    }

    pub fn target(&self) -> Target {
        self.target.clone()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
