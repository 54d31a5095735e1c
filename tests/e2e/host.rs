//! The one fixture: a daemon of its own on a state directory of its own, with the shared default image.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

pub const FCD: &str = env!("CARGO_BIN_EXE_fcd");
pub const FCCTL: &str = env!("CARGO_BIN_EXE_fcctl");

/// Everything that is waited for here is a matter of seconds; this only bounds a hang.
const DEADLINE: Duration = Duration::from_secs(120);

pub struct Host {
    // Dropped first: nothing can be removed below a mount that is still there.
    disk: Option<SmallDisk>,
    dir: tempfile::TempDir,
    fcd: Option<Child>,
    config: String,
    /// The reader of a daemon's stderr that is a full pipe.
    unread_log: Option<std::os::fd::OwnedFd>,
}

/// `target/tmp/e2e`, on the file system of the checkout. VMMs and other callers have uids of their own when root runs the
/// tests: if they may not enter the checkout, as below root's home, a directory of this checkout's in `/var/tmp`.
fn base() -> PathBuf {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let own = Path::new(env!("CARGO_TARGET_TMPDIR")).join("e2e");
    if !nix::unistd::geteuid().is_root() || fcd::host::reach::closed_to_others(&own).is_none() {
        fs::create_dir_all(&own).unwrap();
        return own;
    }
    let mut hasher = DefaultHasher::new();
    own.hash(&mut hasher);
    let dir = Path::new("/var/tmp").join(format!("fcd-e2e-{:016x}", hasher.finish()));
    // An error where it is a link or somebody else's.
    fcd::host::fs::create_dir(&dir, 0o755).unwrap();
    dir
}

/// Waits until `probe` answers, looking again whenever a short poll runs out.
pub fn wait_for<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    wait_for_or(what, &mut String::new(), |_| probe())
}

/// The same; what it says when it gives up is what the probe has last said.
pub fn wait_for_or<T>(what: &str, said: &mut String, mut probe: impl FnMut(&mut String) -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = probe(said) {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {DEADLINE:?}: {said}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// The directory of the default image, built once for all test binaries of this source.
pub fn image() -> &'static Path {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(|| cached_image("default", &[]))
}

/// The directory of an image with these packages, which is there or is built now.
pub fn cached_image(name: &str, packages: &[&str]) -> PathBuf {
    let cache = base().join("image-cache");
    fs::create_dir_all(&cache).unwrap();
    fs::set_permissions(&cache, fs::Permissions::from_mode(0o755)).unwrap();
    let lock = fs::File::create(cache.join(format!("lock-{name}"))).unwrap();
    lock.lock().unwrap();
    let state = cache.join(image_key(packages));
    let image = state.join("images").join(name);
    if !image.join("image.json").exists() {
        let _ = fs::remove_dir_all(&state);
        let mut host =
            Host { disk: None, dir: tempfile::tempdir_in(base()).unwrap(), fcd: None, config: String::new(), unread_log: None };
        host.launch(&state);
        let include = packages.join(",");
        let mut args = vec!["image", "build", name];
        args.extend(["--include", &include].into_iter().filter(|_| !packages.is_empty()));
        let built = host.fcctl(&args);
        assert!(built.status.success(), "image build: {}", String::from_utf8_lossy(&built.stderr));
        host.stop_daemon();
    }
    image
}

/// Names what an image is made from: another recipe is another image.
fn image_key(packages: &[&str]) -> String {
    use std::hash::{Hash, Hasher};
    let mut hasher = std::hash::DefaultHasher::new();
    packages.hash(&mut hasher);
    let mut dirs = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src/image")];
    let mut files = Vec::new();
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { dirs.push(path) } else { files.push(path) }
        }
    }
    files.sort();
    for file in files {
        file.hash(&mut hasher);
        fs::read(&file).unwrap().hash(&mut hasher);
    }
    format!("{:016x}", hasher.finish())
}

impl Host {
    pub fn start() -> Self {
        Self::with_config("")
    }

    /// `config` is the text of the configuration file.
    pub fn with_config(config: &str) -> Self {
        Self::prepared(config, None)
    }

    /// Its daemon logs into a pipe that is full and that nobody reads.
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

    /// Its state directory is a file system of its own, of this size. As root only; from the thread that goes on
    /// to use it, for others do not see the mount.
    pub fn on_small_disk(size_mib: u64) -> Self {
        Self::prepared("", Some(&|at| SmallDisk::in_memory(at, size_mib)))
    }

    /// The same with room for so many files.
    pub fn on_few_inodes(count: u64) -> Self {
        Self::prepared("", Some(&|at| SmallDisk::of_few_inodes(at, count)))
    }

    /// The same on ext4, which becomes read-only when it finds an error.
    pub fn on_ext4() -> Self {
        Self::prepared("", Some(&SmallDisk::ext4))
    }

    /// The same on XFS, whose files share blocks.
    pub fn on_xfs() -> Self {
        Self::prepared("", Some(&SmallDisk::xfs))
    }

    fn prepared(config: &str, disk: Option<&dyn Fn(PathBuf) -> SmallDisk>) -> Self {
        let image = image();
        let dir = tempfile::tempdir_in(base()).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let mut host = Self { disk: None, dir, fcd: None, config: config.to_owned(), unread_log: None };
        host.disk = disk.map(|mount| mount(host.state()));
        host.add_image(image);
        let state = host.state();
        host.launch(&state);
        host
    }

    /// An image of the cache's, in this state directory too.
    pub fn add_image(&self, image: &Path) {
        let own = self.state().join("images").join(image.file_name().unwrap());
        fs::create_dir_all(&own).unwrap();
        fs::set_permissions(self.state(), fs::Permissions::from_mode(0o711)).unwrap();
        fs::set_permissions(self.state().join("images"), fs::metadata(image.parent().unwrap()).unwrap().permissions()).unwrap();
        fs::set_permissions(&own, fs::metadata(image).unwrap().permissions()).unwrap();
        for entry in fs::read_dir(image).unwrap() {
            let from = entry.unwrap().path();
            let to = own.join(from.file_name().unwrap());
            if self.disk.is_some() {
                run(Command::new("cp").args(["-p", "--sparse=always"]).args([&from, &to]));
            } else {
                fs::hard_link(&from, to).unwrap();
            }
        }
        if self.disk.is_some() {
            // As a build has done.
            run(Command::new("sync").arg("-f").arg(&own));
        }
    }

    pub fn disk(&self) -> &SmallDisk {
        self.disk.as_ref().expect("a small disk")
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
        self.fcd.as_ref().expect("a daemon runs").id()
    }

    fn launch(&mut self, state: &Path) {
        let config = self.dir.path().join("config.toml");
        fs::write(&config, &self.config).unwrap();
        let log = fs::File::options().create(true).append(true).open(self.dir.path().join("fcd.log")).unwrap();
        self.launch_into(state, log);
    }

    fn launch_into(&mut self, state: &Path, log: fs::File) {
        let config = self.dir.path().join("config.toml");
        let child = Command::new(FCD)
            .args(["--config".as_ref(), config.as_os_str(), "--state-dir".as_ref(), state.as_os_str()])
            .args(["--socket".as_ref(), self.socket().as_os_str()])
            // A breach of the lock order ends the daemon, whatever catches panics.
            .env("FCD_LOCK_ABORT", "1")
            .env("FCD_TEST_DIE_AT", self.die_at())
            // Every test's daemon is alone with what would be its host.
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
            self.fcctl(&["rpc", "fcd.info"]).status.success().then_some(())
        });
    }

    /// Where it is written at which of its next points the daemon dies.
    fn die_at(&self) -> PathBuf {
        self.dir.path().join("die-at")
    }

    /// It dies, as by `kill -9`, at the n-th effect or commit from now on.
    pub fn arm(&self, n: u64) {
        // Whole at once: it is read at every point.
        let draft = self.dir.path().join("die-at.new");
        fs::write(&draft, n.to_string()).unwrap();
        fs::rename(draft, self.die_at()).unwrap();
    }

    /// Whether it has died of that, which it does not do any more. One that hung up on somebody is about to.
    pub fn disarm(&mut self, has_hung_up: bool) -> bool {
        fs::remove_file(self.die_at()).unwrap();
        let mut fcd = self.fcd.take().expect("a daemon runs");
        let end = if has_hung_up { Some(fcd.wait().unwrap()) } else { fcd.try_wait().unwrap() };
        assert!(
            end.is_none_or(|status| std::os::unix::process::ExitStatusExt::signal(&status) == Some(9)),
            "{end:?}\n{}",
            self.log()
        );
        self.fcd = Some(fcd).filter(|_| end.is_none());
        end.is_some()
    }

    /// The daemon again, on the same state.
    pub fn relaunch(&mut self) {
        assert!(self.fcd.is_none());
        let state = self.state();
        self.launch(&state);
    }

    /// SIGTERM, and the drain.
    pub fn stop_daemon(&mut self) {
        if let Some(mut fcd) = self.fcd.take() {
            signal(fcd.id(), "TERM");
            let status = fcd.wait().unwrap();
            assert!(status.success(), "fcd ended with {status}\n{}", self.log());
        }
    }

    pub fn kill_daemon(&mut self) {
        let mut fcd = self.fcd.take().expect("a daemon runs");
        fcd.kill().unwrap();
        fcd.wait().unwrap();
    }

    /// `fcctl` with these arguments, not yet run.
    pub fn command(&self, args: &[&str]) -> Command {
        fcctl_at(&self.socket(), args)
    }

    pub fn fcctl(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Its stdout; a failure fails the test.
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

    /// Its exit status and stderr.
    #[track_caller]
    pub fn fails(&self, args: &[&str]) -> (i32, String) {
        let out = self.fcctl(args);
        assert!(!out.status.success(), "fcctl {args:?} did not fail");
        (out.status.code().unwrap(), String::from_utf8_lossy(&out.stderr).into_owned())
    }

    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        let mut all = vec!["--json"];
        all.extend(args);
        serde_json::from_str(&self.ok(&all)).unwrap()
    }

    /// A VM that has booted.
    #[track_caller]
    pub fn boot(&self, name: &str) {
        self.ok(&["vm", "create", "--name", name]);
        self.ok(&["start", name]);
    }

    /// A command line in the guest's shell: its stdout.
    #[track_caller]
    pub fn sh(&self, vm: &str, script: &str) -> String {
        self.ok(&["exec", vm, "--", "sh", "-c", script])
    }

    /// `fcctl`, its output in files.
    pub fn spawn(&self, args: &[&str]) -> Spawned {
        Spawned::start(&mut self.command(args))
    }

    /// `fcctl` with these bytes on its stdin.
    pub fn feed(&self, args: &[&str], stdin: &[u8]) -> Output {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, stdin).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        self.command(args).stdin(file).output().unwrap()
    }

    /// One call on a connection of its own, as a script without `fcctl` makes it: the whole answer.
    pub fn rpc(&self, method: &str, params: serde_json::Value) -> serde_json::Value {
        let mut stream = std::os::unix::net::UnixStream::connect(self.socket()).unwrap();
        let line = serde_json::json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
        std::io::Write::write_all(&mut stream, format!("{line}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stream), &mut answer).unwrap();
        serde_json::from_str(&answer).unwrap()
    }

    /// A fact of `vm show`.
    #[track_caller]
    pub fn show(&self, vm: &str, fact: &str) -> serde_json::Value {
        self.json(&["vm", "show", vm])[fact].clone()
    }

    /// What guests have printed.
    fn consoles(&self) -> Vec<(PathBuf, String)> {
        let dirs = fs::read_dir(self.state().join("vms")).into_iter().flatten().flatten();
        let logs = dirs.map(|e| e.path().join("console.log"));
        logs.filter_map(|log| Some((log.clone(), String::from_utf8_lossy(&fs::read(log).ok()?).into_owned()))).collect()
    }

    /// What belongs to this daemon on the host: VMM processes, and the files of its VMs.
    pub fn census(&self) -> Vec<String> {
        let mut found: Vec<String> = vmm_processes(&self.state()).into_iter().map(|p| format!("process {p}")).collect();
        if let Ok(entries) = fs::read_dir(self.state().join("vms")) {
            found.extend(entries.map(|e| format!("directory {}", e.unwrap().path().display())));
        }
        found.sort();
        found
    }
}

/// `fcctl` with these arguments for the daemon at this socket, not yet run.
pub fn fcctl_at(socket: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(FCCTL);
    command.arg("--socket").arg(socket).args(args).stdin(Stdio::null());
    command
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.fcd.is_none() {
            return;
        }
        let consoles = if std::thread::panicking() { self.consoles() } else { Vec::new() };
        let all = self.fcctl(&["ps", "-aq"]);
        for id in String::from_utf8_lossy(&all.stdout).split_whitespace() {
            let _ = self.fcctl(&["rm", "-f", id]);
        }
        if std::thread::panicking() {
            eprintln!("--- fcd.log\n{}", self.log());
            consoles.iter().for_each(|(path, text)| eprintln!("--- {}\n{text}", path.display()));
            let _ = self.fcd.take().map(|mut c| c.kill());
            return;
        }
        self.stop_daemon();
        assert_eq!(self.census(), Vec::<String>::new(), "left over");
    }
}

/// A file system in a mount namespace of the calling thread's and of what it starts: it goes with them.
pub struct SmallDisk(PathBuf);

/// Sparse: what is written to it counts.
const XFS_BYTES: u64 = 2 << 30;
const EXT4_BYTES: u64 = 2 << 30;

impl SmallDisk {
    fn in_memory(at: PathBuf, size_mib: u64) -> Self {
        Self::mount(at, &["-t", "tmpfs", "-o", &format!("size={size_mib}M,mode=711"), "fcd-test"])
    }

    fn of_few_inodes(at: PathBuf, count: u64) -> Self {
        Self::mount(at, &["-t", "tmpfs", "-o", &format!("size=1G,nr_inodes={count},mode=711"), "fcd-test"])
    }

    fn xfs(at: PathBuf) -> Self {
        let file = at.with_extension("xfs");
        fs::File::create(&file).unwrap().set_len(XFS_BYTES).unwrap();
        run(Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&file));
        let mounted = Self::mount(at, &["-t", "xfs", "-o", "loop", file.to_str().unwrap()]);
        fs::set_permissions(&mounted.0, fs::Permissions::from_mode(0o711)).unwrap();
        mounted
    }

    fn ext4(at: PathBuf) -> Self {
        let file = at.with_extension("ext4");
        fs::File::create(&file).unwrap().set_len(EXT4_BYTES).unwrap();
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&file));
        let mounted = Self::mount(at, &["-t", "ext4", "-o", "loop,errors=remount-ro", file.to_str().unwrap()]);
        fs::set_permissions(&mounted.0, fs::Permissions::from_mode(0o711)).unwrap();
        mounted
    }

    /// An error that its kernel finds: from here on nothing can be written, whoever has it open.
    pub fn break_ext4(&self) {
        let out = Command::new("findmnt").args(["-no", "SOURCE"]).arg(&self.0).output().unwrap();
        let device = String::from_utf8(out.stdout).unwrap();
        let device = Path::new(device.trim()).file_name().unwrap().to_owned();
        fs::write(Path::new("/sys/fs/ext4").join(device).join("trigger_fs_error"), "1").unwrap();
    }

    /// As an administrator does after a reboot.
    pub fn mend_ext4(&self) {
        // Those who had files open on it have just been killed.
        wait_for("it is unmounted", || Command::new("umount").arg(&self.0).status().unwrap().success().then_some(()));
        let file = self.0.with_extension("ext4");
        let status = Command::new("e2fsck").args(["-f", "-y"]).arg(&file).stdout(Stdio::null()).stderr(Stdio::null()).status();
        assert!(matches!(status.unwrap().code(), Some(0 | 1)), "e2fsck(8): errors were corrected, or there were none");
        run(Command::new("mount").args(["-t", "ext4", "-o", "loop"]).arg(&file).arg(&self.0));
    }

    fn mount(at: PathBuf, args: &[&str]) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "mounts a file system: run the tests as root");
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        run(Command::new("mount").args(["--make-rprivate", "/"]));
        fs::create_dir_all(&at).unwrap();
        run(Command::new("mount").args(args).arg(&at));
        Self(at)
    }

    /// Leaves so much room, and nothing more.
    pub fn fill(&self, leave_bytes: u64) {
        let stat = nix::sys::statvfs::statvfs(&self.0).unwrap();
        let free = stat.blocks_free() * stat.fragment_size();
        let file = fs::File::options().create(true).append(true).open(self.0.join("fill")).unwrap();
        let (from, more) = (file.metadata().unwrap().len(), free.saturating_sub(leave_bytes));
        if more > 0 {
            nix::fcntl::posix_fallocate(&file, from as i64, more as i64).unwrap();
        }
    }

    /// Takes every inode.
    pub fn fill_inodes(&self) {
        let dir = self.0.join("inodes");
        fs::create_dir(&dir).unwrap();
        let made = (0..).map(|n| fs::File::create(dir.join(format!("{n}")))).find_map(Result::err).unwrap();
        assert_eq!(made.kind(), std::io::ErrorKind::StorageFull);
    }

    pub fn free_inodes(&self) {
        fs::remove_dir_all(self.0.join("inodes")).unwrap();
    }

    /// Nothing on it can be changed, or can again.
    pub fn set_read_only(&self, is_so: bool) {
        run(Command::new("mount").args(["-o", if is_so { "remount,ro" } else { "remount,rw" }]).arg(&self.0));
    }

    pub fn free(&self) {
        fs::remove_file(self.0.join("fill")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[track_caller]
fn run(command: &mut Command) {
    let status = command.status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}

/// Processes of VMMs that work on this state directory.
pub fn vmm_processes(state: &Path) -> Vec<u32> {
    let needle = state.join("vms").display().to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let mut line = String::new();
        if let Ok(mut file) = fs::File::open(entry.path().join("cmdline")) {
            let _ = file.read_to_string(&mut line);
        }
        if line.starts_with("qemu") || line.contains("/qemu") {
            let cwd = fs::read_link(entry.path().join("cwd")).unwrap_or_default();
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

/// stdout and stderr as text.
pub fn text(out: &Output) -> (String, String) {
    (String::from_utf8_lossy(&out.stdout).into_owned(), String::from_utf8_lossy(&out.stderr).into_owned())
}

/// A process of ours with its output in files, so that it can be looked at while it runs and never blocks on it.
pub struct Spawned {
    pub child: Child,
    out: tempfile::NamedTempFile,
    err: tempfile::NamedTempFile,
}

impl Spawned {
    pub fn start(command: &mut Command) -> Self {
        let (out, err) = (tempfile::NamedTempFile::new().unwrap(), tempfile::NamedTempFile::new().unwrap());
        let child = command.stdout(out.reopen().unwrap()).stderr(err.reopen().unwrap()).spawn().unwrap();
        Self { child, out, err }
    }

    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.out.path()).unwrap()).into_owned()
    }
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.err.path()).unwrap()).into_owned()
    }
    pub fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }

    /// Waits until its stdout holds `text`.
    #[track_caller]
    pub fn says(&mut self, text: &str) {
        wait_for(&format!("{text:?} on stdout"), || {
            if self.stdout().contains(text) {
                return Some(());
            }
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none() || self.stdout().contains(text), "{ended:?}: {}{}", self.stdout(), self.stderr());
            None
        });
    }

    /// Its exit status and how long that took from now.
    pub fn end(&mut self) -> (Option<i32>, Duration) {
        let begun = Instant::now();
        let status = wait_for("the end of a process", || self.child.try_wait().unwrap());
        (status.code(), begun.elapsed())
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
