//! Kills the daemon repeatedly while clients use real guests on a bridge. No acknowledged change
//! may be lost, and nothing may be left over. `scripts/soak` sets the duration.

use crate::bridge::{enter_a_host_with_an_outside, on_the_bridge, published};
use crate::host::{Host, fcctl_at, wait_for};
use crate::random::Random;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const CLIENTS: u64 = 4;
/// The bounds of the time between two kills in milliseconds. The time is chosen on a logarithmic
/// scale.
const KILL_MS: (f64, f64) = (50.0, 30_000.0);
const SECONDS_DEFAULT: u64 = 600;
/// The size of a tree whose import takes one or two seconds.
const TREE_BYTES: usize = 15 << 20;
/// `fcctl`'s exit statuses for a VM that does not exist, for a VM that is not reconciled yet, and
/// for a daemon that does not respond.
const NOT_FOUND: i32 = 3;
const BUSY: i32 = 4;
const UNREACHABLE: i32 = 5;

/// A VM as `vm show` reports it.
#[derive(Clone, Debug, PartialEq)]
struct Seen {
    state: String,
    pid: Option<u64>,
}

/// A client's knowledge of its VM.
#[derive(Clone, Debug, PartialEq)]
enum Known {
    /// The VM does not exist.
    Gone,
    Is(Seen),
    /// The VM has this state. The next look shows its process.
    Became(&'static str),
    /// The last call did not succeed, so its effect is unknown. If true, the VM may not exist.
    Open(bool),
}

struct Worker<'a> {
    socket: PathBuf,
    name: String,
    tree: tempfile::TempDir,
    random: Random,
    known: Known,
    /// The tag of the last acknowledged import, or `None` if a later operation may have changed the
    /// workspace.
    tag: Option<String>,
    acknowledged: &'a AtomicU64,
}

impl Worker<'_> {
    /// Waits until the VM is in no transition. Returns `None` if the VM does not exist. The daemon
    /// may be killed and restarted during the wait.
    fn settled(&self) -> Option<Seen> {
        wait_for(&format!("{} is at rest", self.name), || {
            let out = fcctl_at(&self.socket, &["--json", "vm", "show", &self.name])
                .output()
                .unwrap();
            match out.status.code() {
                Some(0) => {
                    let vm: Value = serde_json::from_slice(&out.stdout).unwrap();
                    let state = vm["state"].as_str().unwrap().to_owned();
                    let is_moving = matches!(&*state, "starting" | "stopping" | "deleting")
                        || !vm["op"].is_null();
                    (!is_moving).then(|| {
                        Some(Seen {
                            state,
                            pid: vm["pid"].as_u64(),
                        })
                    })
                }
                Some(NOT_FOUND) => Some(None),
                _ => None,
            }
        })
    }

    fn check(&mut self) {
        let seen = self.settled();
        let fits = match (&self.known, &seen) {
            (Known::Gone, None) | (Known::Open(true), None) => true,
            (Known::Is(known), Some(seen)) => known == seen,
            (Known::Became(state), Some(seen)) => seen.state == *state,
            (Known::Open(_), Some(seen)) => seen.state != "failed",
            _ => false,
        };
        assert!(
            fits,
            "{}: known is {:?}, and there is {seen:?}",
            self.name, self.known
        );
        self.known = seen.map_or(Known::Gone, Known::Is);
    }

    fn run(&self, args: &[&str]) -> i32 {
        let mut all = args.to_vec();
        all.push(&self.name);
        let out = fcctl_at(&self.socket, &all).output().unwrap();
        let status = out.status.code().expect("fcctl is not killed");
        let said = String::from_utf8_lossy(&out.stderr);
        // A call may fail only because the daemon was killed or has not reconciled the VM yet.
        assert!(
            matches!(status, 0 | BUSY | UNREACHABLE),
            "{args:?} {}: {said}",
            self.name
        );
        status
    }

    /// Runs one operation that the VM's state allows, and records what the client knows afterwards.
    fn act(&mut self) {
        let is_running = matches!(&self.known, Known::Is(seen) if seen.state == "running");
        let (args, became): (&[&str], _) = match (&self.known, is_running, self.random.one_in(8)) {
            (Known::Gone, ..) => (
                &["vm", "create", "-p", "22", "--work-disk", "64M", "--name"],
                Known::Became("created"),
            ),
            (_, _, true) => (&["rm", "-f"], Known::Gone),
            (_, false, _) => (&["start"], Known::Became("running")),
            (_, true, _) => match self.random.below(7) {
                0 => (&["vm", "kill"], Known::Became("stopped")),
                1 => (&["vm", "restart"], Known::Became("running")),
                2 | 3 => (&["stop"], Known::Became("stopped")),
                4 => return self.read(),
                _ => return self.import(),
            },
        };
        // An import is synced before it is acknowledged, so it survives a kill.
        if args[0] == "rm" {
            self.tag = None;
        }
        let may_be_gone = args[0] == "rm" || args[0] == "vm" && args[1] == "create";
        match self.run(args) {
            0 => {
                self.acknowledged.fetch_add(1, Ordering::Relaxed);
                self.known = became;
            }
            _ => self.known = Known::Open(may_be_gone),
        }
    }

    fn import(&mut self) {
        let tag = format!("{}-{}", self.name, self.random.next());
        std::fs::write(self.tree.path().join("tag"), &tag).unwrap();
        self.tag = None;
        let tree = self.tree.path().to_str().unwrap();
        let prepare = [
            "workspace",
            "prepare",
            &self.name,
            tree,
            "--guest-path",
            "/root/tree",
            "--overwrite",
        ];
        let out = fcctl_at(&self.socket, &prepare).output().unwrap();
        let (status, said) = (out.status.code(), String::from_utf8_lossy(&out.stderr));
        assert!(
            matches!(status, Some(0 | BUSY | UNREACHABLE)),
            "import into {}: {status:?} {said}",
            self.name
        );
        if out.status.success() {
            self.acknowledged.fetch_add(1, Ordering::Relaxed);
            self.tag = Some(tag);
        }
    }

    /// Checks that the guest has the data of the last acknowledged import, if the client knows it.
    fn read(&mut self) {
        let Some(tag) = &self.tag else { return };
        let out = fcctl_at(
            &self.socket,
            &["exec", &self.name, "--", "cat", "/root/tree/tag"],
        )
        .output()
        .unwrap();
        if out.status.success() {
            self.acknowledged.fetch_add(1, Ordering::Relaxed);
            assert_eq!(
                &String::from_utf8_lossy(&out.stdout),
                tag,
                "{} lacks the data of its last acknowledged import",
                self.name
            );
        }
    }

    fn work(mut self, is_over: &AtomicBool) {
        while !is_over.load(Ordering::Relaxed) {
            self.check();
            self.act();
        }
        self.check();
    }
}

/// The number of kills for each kind of operation in progress.
#[derive(Default, Debug)]
struct Kills {
    all: u64,
    starting: u64,
    running: u64,
    importing: u64,
    stopping: u64,
}

impl Kills {
    fn count(&mut self, host: &Host) {
        let json = |args: &[&str]| -> Vec<Value> {
            let out = fcctl_at(&host.socket(), args).output().unwrap();
            assert!(
                out.status.success() || out.status.code() == Some(UNREACHABLE),
                "{args:?}"
            );
            serde_json::from_slice(&out.stdout).unwrap_or_default()
        };
        let vms = json(&["--json", "ps", "-a"]);
        let has = |state: &str| u64::from(vms.iter().any(|vm| vm["state"] == state));
        self.all += 1;
        self.starting += has("starting");
        self.running += has("running");
        self.stopping += has("stopping") | has("deleting");
        let ops = json(&["--json", "op", "list"]);
        self.importing += u64::from(
            ops.iter()
                .any(|op| op["method"] == "workspace.prepare" && op["state"] == "running"),
        );
    }
}

fn env(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|n| n.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
#[ignore = "takes as long as requested: scripts/soak"]
fn soak_with_repeated_kills_loses_nothing() {
    let seconds = env("FCD_SOAK_SECONDS").unwrap_or(SECONDS_DEFAULT);
    let seed = env("FCD_SOAK_SEED")
        .unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64);
    println!("soak: {seconds} s; draw the same again with FCD_SOAK_SEED={seed}");
    enter_a_host_with_an_outside();
    let mut host = Host::with_config("[network]\ndriver = \"bridge\"\n");
    let (acknowledged, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut kills = Kills::default();
    let begun = Instant::now();
    std::thread::scope(|s| {
        let workers: Vec<_> = (0..CLIENTS)
            .map(|n| worker(&host.socket(), n, seed, &acknowledged))
            .collect();
        let workers: Vec<_> = workers
            .into_iter()
            .map(|w| s.spawn(|| w.work(&is_over)))
            .collect();
        let mut random = Random::new(seed, CLIENTS);
        while begun.elapsed().as_secs() < seconds
            && !workers
                .iter()
                .any(std::thread::ScopedJoinHandle::is_finished)
        {
            let share = random.below(1 << 20) as f64 / f64::from(1 << 20);
            let ms = KILL_MS.0 * (KILL_MS.1 / KILL_MS.0).powf(share);
            std::thread::park_timeout(Duration::from_millis(ms as u64));
            kills.count(&host);
            host.kill_daemon();
            host.relaunch();
        }
        is_over.store(true, Ordering::Relaxed);
    });
    let leaks = host.json(&["doctor", "--leaks"]);
    assert_eq!(leaks.as_array().map(Vec::len), Some(0), "{leaks}");
    for vm in host.ok(&["ps", "-aq"]).split_whitespace() {
        host.ok(&["rm", "-f", vm]);
    }
    assert_eq!(on_the_bridge(), (0, 0));
    assert_eq!(published(), 0, "no published port is left");
    assert_eq!(host.census(), Vec::<String>::new(), "left over");
    println!(
        "soak: {} s, {kills:?}, {} acknowledged operations, 0 lost, 0 left over",
        begun.elapsed().as_secs(),
        acknowledged.into_inner()
    );
}

fn worker<'a>(socket: &Path, n: u64, seed: u64, acknowledged: &'a AtomicU64) -> Worker<'a> {
    let tree = tempfile::tempdir().unwrap();
    std::fs::write(tree.path().join("large"), vec![n as u8; TREE_BYTES]).unwrap();
    Worker {
        socket: socket.to_owned(),
        name: format!("soak-{n}"),
        tree,
        random: Random::new(seed, n),
        known: Known::Gone,
        tag: None,
        acknowledged,
    }
}
