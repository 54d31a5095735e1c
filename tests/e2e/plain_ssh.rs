//! Tests that ssh, scp and rsync work with the configuration that `fcctl ssh-config` prints.

use crate::host::{Host, text};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// An ssh configuration for some VMs. The directory of the keys has a name with a space and a
/// percent sign.
pub struct PlainSsh {
    dir: tempfile::TempDir,
}

impl PlainSsh {
    pub fn new(host: &Host, vms: &[&str]) -> Self {
        let ssh = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        let mut args = vec!["ssh-config"];
        args.extend(vms);
        let out = host
            .command(&args)
            .env("XDG_STATE_HOME", ssh.dir.path().join("my state 5%"))
            .output()
            .unwrap();
        assert!(out.status.success(), "{:?}", text(&out));
        // The configuration is appended to a file whose last line does not end with a newline.
        let config = [b"Host other\n  Port 1".as_slice(), &out.stdout].concat();
        std::fs::write(ssh.config(), config).unwrap();
        ssh
    }

    pub fn config(&self) -> PathBuf {
        self.dir.path().join("config")
    }

    /// Returns the path of a file in a directory that lives as long as the configuration.
    pub fn file(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// Runs `ssh`, `scp` or `sftp` with the configuration, and returns its stdout.
    #[track_caller]
    pub fn run(&self, program: &str, args: &[&str]) -> String {
        let mut command = Command::new(program);
        command.arg("-F").arg(self.config()).args(args);
        self.output(&mut command)
    }

    /// Runs `rsync` with the configuration.
    #[track_caller]
    pub fn rsync(&self, args: &[&str]) -> String {
        let shell = format!("ssh -F {}", self.config().display());
        let mut command = Command::new("rsync");
        command.args(["-e", &shell]).args(args);
        self.output(&mut command)
    }

    #[track_caller]
    fn output(&self, command: &mut Command) -> String {
        // Without these variables, only the configuration names the directory of the keys.
        let out = command
            .env_remove("XDG_STATE_HOME")
            .env_remove("HOME")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let (stdout, stderr) = text(&out);
        assert!(out.status.success(), "{command:?}: {stdout}{stderr}");
        assert_eq!(stderr, "", "{command:?}");
        stdout
    }

    /// Copies files in both directions with each program.
    pub fn check_copies(&self, vm: &str) {
        let content: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        std::fs::write(self.file("sent"), &content).unwrap();
        self.run("scp", &["-q", &self.file("sent"), &format!("{vm}:by-scp")]);
        self.run("scp", &["-q", &format!("{vm}:by-scp"), &self.file("got")]);
        assert!(std::fs::read(self.file("got")).unwrap() == content);
        self.put_rsync(vm);
        let remote = "--rsync-path=LD_LIBRARY_PATH=/opt/rsync /opt/rsync/rsync";
        let tree = self.file("tree");
        std::fs::create_dir_all(format!("{tree}/a b")).unwrap();
        std::fs::write(format!("{tree}/a b/file"), "hello").unwrap();
        let there = format!("{vm}:by-rsync");
        self.rsync(&["-a", remote, &format!("{tree}/"), &there]);
        let back = self.file("back");
        self.rsync(&["-a", remote, &format!("{there}/"), &back]);
        assert_eq!(std::fs::read(format!("{back}/a b/file")).unwrap(), b"hello");
    }

    /// Copies the host's rsync and its libraries to the guest, which does not have rsync.
    fn put_rsync(&self, vm: &str) {
        let out = Command::new("sh")
            .args([
                "-ec",
                "which rsync; ldd \"$(which rsync)\" | sed -n 's/.* => \\(\\/[^ ]*\\).*/\\1/p'",
            ])
            .output()
            .unwrap();
        let files = text(&out).0;
        assert!(out.status.success(), "apt install rsync: {files}");
        self.run("ssh", &[vm, "mkdir -p /opt/rsync"]);
        let to = format!("{vm}:/opt/rsync/");
        let mut args = vec!["-q"];
        // libc is left out, because the guest's own C library must match the guest's loader.
        args.extend(files.lines().filter(|file| !file.contains("/libc.so")));
        args.push(&to);
        self.run("scp", &args);
    }
}
