//! The fixture of all tests: a daemon with its own state directory and the shared default image.

mod disks;
mod images;
pub mod registry;
mod spawned;

pub use disks::SmallDisk;
pub use images::{cached_dir, cached_image, full_image, image, runtimes};
pub use spawned::Spawned;

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

pub const FCD: &str = env!("CARGO_BIN_EXE_fcd");
pub const FCCTL: &str = env!("CARGO_BIN_EXE_fcctl");

/// The time after which a wait fails the test. Everything that tests wait for takes seconds.
const DEADLINE: Duration = Duration::from_secs(120);

pub struct Host {
    // This field is first and so dropped first, because a mounted directory cannot be removed.
    disk: Option<SmallDisk>,
    dir: tempfile::TempDir,
    fcd: Option<Child>,
    config: String,
    /// The read end of the daemon's stderr if stderr is a full pipe.
    unread_log: Option<std::os::fd::OwnedFd>,
    /// `RUST_LOG` of the daemon.
    log_filter: &'static str,
}

/// Returns the directory of the tests' hosts. It is `target/tmp/e2e`, on the file system of the
/// checkout. If root runs the tests, VMMs and other callers have their own uids, which may not be
/// able to enter the checkout, for example in root's home. In that case this returns a directory in
/// `/var/tmp` whose name depends on the checkout.
fn base() -> PathBuf {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let own = Path::new(env!("CARGO_TARGET_TMPDIR")).join("e2e");
    if !nix::unistd::geteuid().is_root()
        || fcd::testing::host::reach::closed_to_others(&own).is_none()
    {
        fs::create_dir_all(&own).unwrap();
        return own;
    }
    let mut hasher = DefaultHasher::new();
    own.hash(&mut hasher);
    let dir = Path::new("/var/tmp").join(format!("fcd-e2e-{:016x}", hasher.finish()));
    // This fails if the directory is a link or belongs to another user.
    fcd::testing::host::fs::create_dir(&dir, 0o755).unwrap();
    dir
}

/// Polls `probe` with short pauses until it returns a value. Fails the test at the deadline.
pub fn wait_for<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    wait_for_or(what, &mut String::new(), |_| probe())
}

/// Like [`wait_for`], but the failure message contains the probe's last text.
pub fn wait_for_or<T>(
    what: &str,
    said: &mut String,
    mut probe: impl FnMut(&mut String) -> Option<T>,
) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = probe(said) {
            return found;
        }
        assert!(
            Instant::now() < deadline,
            "{what}: not within {DEADLINE:?}: {said}"
        );
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

impl Host {
    pub fn start() -> Self {
        Self::with_config("")
    }

    /// Starts a host whose configuration file contains `config`.
    pub fn with_config(config: &str) -> Self {
        Self::prepared(config, None)
    }

    /// Starts a host whose daemon logs to a full pipe that nobody reads.
    pub fn with_unread_log() -> Self {
        let mut host = Self::start();
        host.stop_daemon();
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        while rustix::io::write(&writer, &[b'x'; 4096]).is_ok() {}
        rustix::io::ioctl_fionbio(&writer, false).unwrap();
        host.unread_log = Some(reader);
        let state = host.state();
        host.launch_into(&state, writer.into());
        host
    }

    /// Starts a host whose daemon logs as much as it can.
    pub fn with_full_log() -> Self {
        let mut host = Self::start();
        host.stop_daemon();
        host.log_filter = "trace";
        host.relaunch();
        host
    }

    /// Starts a host whose state directory is a file system of this size. Needs root. Only the
    /// calling thread may use the host, because other threads do not see the mount.
    pub fn on_small_disk(size_mib: u64) -> Self {
        Self::prepared("", Some(&|at| SmallDisk::in_memory(at, size_mib)))
    }

    /// Like [`Self::on_small_disk`], but limits the number of files.
    pub fn on_few_inodes(count: u64) -> Self {
        Self::prepared("", Some(&|at| SmallDisk::of_few_inodes(at, count)))
    }

    /// Like [`Self::on_small_disk`], but uses ext4, which becomes read-only after an error.
    pub fn on_ext4() -> Self {
        Self::prepared("", Some(&SmallDisk::ext4))
    }

    /// Like [`Self::on_small_disk`], but uses XFS, where files can share blocks.
    pub fn on_xfs() -> Self {
        Self::prepared("", Some(&SmallDisk::xfs))
    }

    fn prepared(config: &str, disk: Option<&dyn Fn(PathBuf) -> SmallDisk>) -> Self {
        let image = image();
        let dir = tempfile::tempdir_in(base()).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let mut host = Self {
            disk: None,
            dir,
            fcd: None,
            config: config.to_owned(),
            unread_log: None,
            log_filter: "info",
        };
        host.disk = disk.map(|mount| mount(host.state()));
        host.add_image(image);
        let state = host.state();
        host.launch(&state);
        host
    }

    /// Adds an image from the cache to this state directory.
    pub fn add_image(&self, image: &Path) {
        let own = self.state().join("images").join(image.file_name().unwrap());
        fs::create_dir_all(&own).unwrap();
        fs::set_permissions(self.state(), fs::Permissions::from_mode(0o711)).unwrap();
        fs::set_permissions(
            self.state().join("images"),
            fs::metadata(image.parent().unwrap()).unwrap().permissions(),
        )
        .unwrap();
        fs::set_permissions(&own, fs::metadata(image).unwrap().permissions()).unwrap();
        for entry in fs::read_dir(image).unwrap() {
            let from = entry.unwrap().path();
            let to = own.join(from.file_name().unwrap());
            if self.disk.is_some() {
                run(Command::new("cp")
                    .args(["-p", "--sparse=always"])
                    .args([&from, &to]));
            } else {
                fs::hard_link(&from, to).unwrap();
            }
        }
        if self.disk.is_some() {
            // A real image build also syncs.
            run(Command::new("sync").arg("-f").arg(&own));
        }
    }

    /// Adds the guest runtime that was built with the default image.
    pub fn add_runtime(&self) {
        for runtime in fs::read_dir(runtimes()).unwrap().flatten() {
            let own = self.state().join("runtimes").join(runtime.file_name());
            fs::create_dir(&own).unwrap();
            fs::set_permissions(&own, fs::Permissions::from_mode(0o755)).unwrap();
            for file in fs::read_dir(runtime.path()).unwrap().flatten() {
                let (from, to) = (file.path(), own.join(file.file_name()));
                fs::hard_link(&from, &to).unwrap_or_else(|_| {
                    run(Command::new("cp")
                        .args(["-p", "--sparse=always"])
                        .args([from, to]));
                });
            }
        }
    }

    pub fn disk(&self) -> &SmallDisk {
        self.disk.as_ref().expect("this host has no small disk")
    }
    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("fcd.sock")
    }
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("fcd.log")).unwrap_or_default()
    }
    pub fn pid(&self) -> u32 {
        self.fcd.as_ref().expect("no daemon runs").id()
    }

    fn launch(&mut self, state: &Path) {
        let config = self.dir.path().join("config.toml");
        fs::write(&config, &self.config).unwrap();
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join("fcd.log"))
            .unwrap();
        self.launch_into(state, log);
    }

    fn launch_into(&mut self, state: &Path, log: fs::File) {
        let config = self.dir.path().join("config.toml");
        let child = Command::new(FCD)
            .args([
                "--config".as_ref(),
                config.as_os_str(),
                "--state-dir".as_ref(),
                state.as_os_str(),
            ])
            .args(["--socket".as_ref(), self.socket().as_os_str()])
            // A lock-order violation must end the daemon even where panics are caught.
            .env("FCD_LOCK_ABORT", "1")
            .env("FCD_TEST_DIE_AT", self.die_at())
            .env("RUST_LOG", self.log_filter)
            // The tests' daemons must not see each other's claims on the host.
            .env("FCD_TEST_CLAIMS", self.dir.path().join("claims"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.fcd = Some(child);
        wait_for("the daemon answers", || {
            let ended = self.fcd.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "fcd ended: {ended:?}\n{}", self.log());
            self.fcctl(&["rpc", "fcd.info"])
                .status
                .success()
                .then_some(())
        });
    }

    /// Returns the path of the file that tells the daemon at which point to die.
    fn die_at(&self) -> PathBuf {
        self.dir.path().join("die-at")
    }

    /// Makes the daemon die at the n-th effect or commit from now on, as if `kill -9` had ended it.
    pub fn arm(&self, n: u64) {
        self.order(&n.to_string());
    }

    fn order(&self, text: &str) {
        // The file is renamed into place because the daemon reads it at every point.
        let draft = self.dir.path().join("die-at.new");
        fs::write(&draft, text).unwrap();
        fs::rename(draft, self.die_at()).unwrap();
    }

    /// Runs fcctl, stops the daemon before this effect, and continues it after `meanwhile`.
    pub fn interrupted(
        &self,
        args: &[&str],
        effect: &str,
        meanwhile: impl FnOnce(&Spawned),
    ) -> Spawned {
        self.order(&format!("stop {effect}"));
        let mut ran = self.spawn(args);
        let stat = format!("/proc/{}/stat", self.pid());
        wait_for("the daemon is stopped", || {
            let stat = fs::read_to_string(&stat).unwrap();
            let ended = ran.child.try_wait().unwrap();
            assert!(ended.is_none(), "{args:?} ended early: {}", ran.stderr());
            stat.contains(") T ").then_some(())
        });
        meanwhile(&ran);
        signal(self.pid(), "CONT");
        ran.end();
        ran
    }

    /// Removes the order to die. If the daemon has hung up on a caller, waits until the daemon is
    /// dead. Returns true if the daemon has died.
    pub fn disarm(&mut self, has_hung_up: bool) -> bool {
        fs::remove_file(self.die_at()).unwrap();
        let mut fcd = self.fcd.take().expect("no daemon runs");
        let end = if has_hung_up {
            Some(fcd.wait().unwrap())
        } else {
            fcd.try_wait().unwrap()
        };
        assert!(
            end.is_none_or(
                |status| std::os::unix::process::ExitStatusExt::signal(&status) == Some(9)
            ),
            "{end:?}\n{}",
            self.log()
        );
        self.fcd = Some(fcd).filter(|_| end.is_none());
        end.is_some()
    }

    /// Starts the daemon again with the same state.
    pub fn relaunch(&mut self) {
        assert!(self.fcd.is_none());
        let state = self.state();
        self.launch(&state);
    }

    /// Sends SIGTERM and waits until the daemon has drained.
    pub fn stop_daemon(&mut self) {
        if let Some(mut fcd) = self.fcd.take() {
            signal(fcd.id(), "TERM");
            let status = fcd.wait().unwrap();
            assert!(status.success(), "fcd ended with {status}\n{}", self.log());
        }
    }

    pub fn kill_daemon(&mut self) {
        let mut fcd = self.fcd.take().expect("no daemon runs");
        fcd.kill().unwrap();
        fcd.wait().unwrap();
    }

    /// Returns an `fcctl` command with these arguments.
    pub fn command(&self, args: &[&str]) -> Command {
        fcctl_at(&self.socket(), args)
    }

    pub fn fcctl(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs `fcctl`, which must succeed, and returns its stdout.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        let out = self.fcctl(args);
        assert!(
            out.status.success(),
            "fcctl {args:?}: {}\n{}{}\n--- daemon\n{}",
            out.status,
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr),
            self.log()
        );
        String::from_utf8(out.stdout).unwrap()
    }

    /// Runs `fcctl`, which must fail, and returns its exit status and stderr.
    #[track_caller]
    pub fn fails(&self, args: &[&str]) -> (i32, String) {
        let out = self.fcctl(args);
        assert!(!out.status.success(), "fcctl {args:?} did not fail");
        (
            out.status.code().unwrap(),
            String::from_utf8_lossy(&out.stderr).into_owned(),
        )
    }

    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        let mut all = vec!["--json"];
        all.extend(args);
        serde_json::from_str(&self.ok(&all)).unwrap()
    }

    /// Creates a VM and waits until it has booted.
    #[track_caller]
    pub fn boot(&self, name: &str) {
        self.ok(&["vm", "create", "--name", name]);
        self.ok(&["start", name]);
    }

    /// Runs a script in the guest's shell and returns its stdout.
    #[track_caller]
    pub fn sh(&self, vm: &str, script: &str) -> String {
        self.ok(&["exec", vm, "--", "sh", "-c", script])
    }

    /// Starts `fcctl` with its output in files.
    pub fn spawn(&self, args: &[&str]) -> Spawned {
        Spawned::start(&mut self.command(args))
    }

    /// Runs `fcctl` with these bytes on its stdin.
    pub fn feed(&self, args: &[&str], stdin: &[u8]) -> Output {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, stdin).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        self.command(args).stdin(file).output().unwrap()
    }

    /// Makes one call on a new connection, like a script without `fcctl`, and returns the whole
    /// reply.
    pub fn rpc(&self, method: &str, params: serde_json::Value) -> serde_json::Value {
        let mut stream = std::os::unix::net::UnixStream::connect(self.socket()).unwrap();
        let line =
            serde_json::json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
        std::io::Write::write_all(&mut stream, format!("{line}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stream), &mut answer).unwrap();
        serde_json::from_str(&answer).unwrap()
    }

    /// Returns a value from `vm show`.
    #[track_caller]
    pub fn show(&self, vm: &str, fact: &str) -> serde_json::Value {
        self.json(&["vm", "show", vm])[fact].clone()
    }

    /// Returns the path and the text of each VM's console log.
    fn consoles(&self) -> Vec<(PathBuf, String)> {
        let dirs = fs::read_dir(self.state().join("vms"))
            .into_iter()
            .flatten()
            .flatten();
        let logs = dirs.map(|e| e.path().join("console.log"));
        logs.filter_map(|log| {
            Some((
                log.clone(),
                String::from_utf8_lossy(&fs::read(log).ok()?).into_owned(),
            ))
        })
        .collect()
    }

    /// Returns everything on the host that belongs to this daemon: its VMM processes and the
    /// directories of its VMs.
    pub fn census(&self) -> Vec<String> {
        let mut found: Vec<String> = vmm_processes(&self.state())
            .into_iter()
            .map(|p| format!("process {p}"))
            .collect();
        if let Ok(entries) = fs::read_dir(self.state().join("vms")) {
            found.extend(entries.map(|e| format!("directory {}", e.unwrap().path().display())));
        }
        found.sort();
        found
    }
}

/// Returns an `fcctl` command with these arguments for the daemon at this socket.
pub fn fcctl_at(socket: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(FCCTL);
    command
        .arg("--socket")
        .arg(socket)
        .args(args)
        .stdin(Stdio::null());
    command
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.fcd.is_none() {
            return;
        }
        let consoles = if std::thread::panicking() {
            self.consoles()
        } else {
            Vec::new()
        };
        let all = self.fcctl(&["ps", "-aq"]);
        for id in String::from_utf8_lossy(&all.stdout).split_whitespace() {
            let _ = self.fcctl(&["rm", "-f", id]);
        }
        if std::thread::panicking() {
            eprintln!("--- fcd.log\n{}", self.log());
            consoles
                .iter()
                .for_each(|(path, text)| eprintln!("--- {}\n{text}", path.display()));
            let _ = self.fcd.take().map(|mut c| c.kill());
            return;
        }
        self.stop_daemon();
        assert_eq!(self.census(), Vec::<String>::new(), "left over");
    }
}

#[track_caller]
fn run(command: &mut Command) {
    let status = command.status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}

/// Returns the directories in /proc of all processes, by pid.
pub fn processes() -> Vec<(u32, PathBuf)> {
    let pid = |entry: &fs::DirEntry| entry.file_name().to_str()?.parse().ok();
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let all = entries.filter_map(|entry| Some((pid(&entry)?, entry.path())));
    all.collect()
}

/// Returns the VMM processes that use this state directory.
pub fn vmm_processes(state: &Path) -> Vec<u32> {
    let needle = state.join("vms").display().to_string();
    let mut found = Vec::new();
    for (pid, dir) in processes() {
        let mut line = String::new();
        if let Ok(mut file) = fs::File::open(dir.join("cmdline")) {
            let _ = file.read_to_string(&mut line);
        }
        if line.starts_with("qemu") || line.contains("/qemu") {
            let cwd = fs::read_link(dir.join("cwd")).unwrap_or_default();
            if line.contains(&needle) || cwd.starts_with(state) {
                found.push(pid);
            }
        }
    }
    found
}

pub fn signal(pid: u32, name: &str) {
    let signal: nix::sys::signal::Signal = format!("SIG{name}").parse().unwrap();
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), signal);
}

/// Returns stdout and stderr as text.
pub fn text(out: &Output) -> (String, String) {
    (
        String::from_utf8_lossy(&out.stdout).into_owned(),
        String::from_utf8_lossy(&out.stderr).into_owned(),
    )
}
