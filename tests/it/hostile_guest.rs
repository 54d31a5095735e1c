//! Tests with guests whose SSH server attacks its clients. `tests/fake/hostile_sshd.py` talks to
//! the real transport.

use crate::world::{SOON, World};
use fcd::testing::api::exec::{ExecStart, ExecStartRequest, Exit};
use fcd::testing::api::op::{OpList, OpListRequest};
use fcd::testing::error::{Kind, Result};
use fcd::testing::guest::fake::{Answer, FakeTransport};
use fcd::testing::guest::{ExecSpec, SshTransport, Streams, Target, Transport, command_bytes};
use fcd::testing::host::confine;
use fcd::testing::locks::{Cancel, CancelCause};
use ssh_key::{Algorithm, LineEnding, PrivateKey, rand_core::OsRng};
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Modes that send an endless stream of messages that no command needs, with their environment.
const FLOODS: &[(&str, &[(&str, &str)])] = &[
    ("success", &[]),
    ("unknown", &[]),
    ("global", &[]),
    ("open", &[]),
    ("reqs", &[]),
    ("exitsig", &[]),
    ("rekey", &[]),
    ("kexflood", &[]),
    // This mode crashed a daemon running as root: libssh2 dereferences NULL inside a key exchange.
    ("unknown", &[("REKEY", "2000000"), ("PAD", "2000")]),
];

struct HostileGuest {
    server: Child,
    target: Target,
    _dir: tempfile::TempDir,
}

impl HostileGuest {
    fn start(mode: &str, env: &[(&str, &str)]) -> Self {
        // The helper process runs fcd's executable. By default it would run the test's executable.
        confine::set_program(env!("CARGO_BIN_EXE_fcd"));
        let dir = tempfile::tempdir().unwrap();
        let [host, client] =
            [(); 2].map(|()| PrivateKey::random(&mut OsRng, Algorithm::Ed25519).unwrap());
        let host_file = dir.path().join("host");
        std::fs::write(&host_file, host.to_openssh(LineEnding::LF).unwrap()).unwrap();
        std::fs::set_permissions(&host_file, std::fs::Permissions::from_mode(0o600)).unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake/hostile_sshd.py");
        let mut server = Command::new("/usr/bin/python3")
            .arg(script)
            .arg(&host_file)
            .arg(mode)
            .envs(env.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("start /usr/bin/python3");
        let mut port = String::new();
        BufReader::new(server.stdout.take().unwrap())
            .read_line(&mut port)
            .unwrap();
        let port = port
            .trim()
            .parse()
            .expect("a port (apt-get install python3-paramiko)");
        let target = Target {
            addr: SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            user: "root".into(),
            private_key: client.to_openssh(LineEnding::LF).unwrap().to_string(),
            host_key: host.public_key().to_bytes().unwrap(),
            owner: nix::unistd::geteuid()
                .is_root()
                .then_some(fcd::testing::host::Credentials {
                    uid: 1_900_000_077,
                    gid: 1_900_000_077,
                }),
        };
        Self {
            server,
            target,
            _dir: dir,
        }
    }

    /// Runs a command in the guest. Without `deadline` only `cancel` ends it, like a command of the
    /// user.
    fn exec(&self, deadline: Option<Instant>, cancel: &Cancel) -> Result<Exit> {
        let spec = ExecSpec {
            command: "true".into(),
            deadline,
            ..ExecSpec::default()
        };
        SshTransport.exec(&self.target, &spec, Streams::default(), cancel)
    }
}

impl Drop for HostileGuest {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Returns a token that fires when the test has waited long enough.
fn patience() -> Cancel {
    let cancel = Cancel::try_new().unwrap();
    let token = cancel.clone();
    std::thread::spawn(move || {
        std::thread::sleep(SOON * 3);
        token.cancel(CancelCause::Requested);
    });
    cancel
}

fn memory_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix("VmRSS:"))
        .unwrap();
    line.trim().trim_end_matches("kB").trim().parse().unwrap()
}

#[test]
fn flood_without_deadline_is_guest_lost() {
    for (mode, env) in FLOODS {
        let guest = HostileGuest::start(mode, env);
        let e = guest.exec(None, &patience()).unwrap_err();
        assert_eq!(e.kind(), Kind::GuestLost, "{mode} {env:?}: {e}");
        assert!(
            e.to_string()
                .starts_with("the connection to the guest broke: "),
            "{mode} {env:?}: {e}"
        );
        assert!(e.hint_text().is_some());
    }
}

#[test]
fn guest_that_only_sends_keepalives_is_ended_by_caller() {
    let guest = HostileGuest::start("drip", &[]);
    let deadline = Some(Instant::now() + Duration::from_secs(3));
    assert_eq!(
        guest.exec(deadline, &patience()).unwrap_err().kind(),
        Kind::Timeout
    );
}

/// A transport that is real for the hostile VM and fake for the other VMs.
struct OneHostile {
    others: FakeTransport,
    addr: SocketAddr,
    hostile: Target,
}

impl OneHostile {
    fn is_hostile(&self, target: &Target) -> bool {
        target.addr == self.addr
    }
}

impl Transport for OneHostile {
    fn wait_ready(&self, target: &Target, deadline: Instant, cancel: &Cancel) -> Result<()> {
        self.others.wait_ready(target, deadline, cancel)
    }
    fn exec(
        &self,
        target: &Target,
        spec: &ExecSpec,
        streams: Streams<'_>,
        cancel: &Cancel,
    ) -> Result<Exit> {
        if self.is_hostile(target) {
            return SshTransport.exec(&self.hostile, spec, streams, cancel);
        }
        self.others.exec(target, spec, streams, cancel)
    }
}

/// Creates a daemon whose VM `evil` has this guest. Its other VMs have fake guests.
fn world(guest: &HostileGuest) -> World {
    let mut world = World::with(|config| config.limits.stop_timeout_s = 2);
    let (_, addr) = world.running("evil");
    // Only this command reaches the hostile guest. The shutdown of a stop is also an `exec`, and
    // the fake must handle it.
    let harmless = command_bytes(&[b"true".to_vec()], &[], None, None).unwrap();
    world
        .guest
        .on(&String::from_utf8(harmless).unwrap(), |_| Answer::status(0));
    world.running("web");
    let db = world.create("db");
    world.place(&db.id);
    world.transport = Arc::new(OneHostile {
        others: world.guest.clone(),
        addr,
        hostile: guest.target.clone(),
    });
    world.reopen();
    world.daemon().reconciler.reconcile();
    world
}

fn exec_request(vm: &str) -> ExecStartRequest {
    let argv = vec!["true".to_owned()];
    ExecStartRequest {
        vm: vm.into(),
        argv,
        env: vec![],
        workdir: None,
        user: None,
        pty: None,
        streams: vec![],
        no_wait_children: false,
    }
}

/// Makes everyday calls on VMs with healthy guests. Returns the time of each.
fn verbs(world: &World) -> Vec<(&'static str, Duration)> {
    let timed = |verb: &'static str, run: &dyn Fn()| {
        let begun = Instant::now();
        run();
        (verb, begun.elapsed())
    };
    vec![
        timed("show", &|| drop(world.show("web").unwrap())),
        timed("list operations", &|| {
            drop(world.call::<OpList>(&OpListRequest::default()).unwrap())
        }),
        timed("start", &|| drop(world.start("db").unwrap())),
        timed("exec", &|| {
            drop(world.run::<ExecStart>(exec_request("db")).unwrap())
        }),
        timed("stop", &|| drop(world.stop("db").unwrap())),
    ]
}

#[test]
fn daemon_serves_other_vms_during_attack_and_stops_attacker() {
    let guest = HostileGuest::start("unknown", &[("REKEY", "2000000"), ("PAD", "2000")]);
    let world = world(&guest);
    let mut attack = world.begin::<ExecStart>(exec_request("evil"), vec![]);
    verbs(&world);
    let failure = attack.finish(SOON * 3).unwrap_err();
    assert!(
        failure
            .to_string()
            .contains("the connection to the guest broke"),
        "{failure}"
    );
    world.stop("evil").unwrap();
    world.delete("evil").unwrap();
    verbs(&world);
}

#[test]
#[ignore = "measures: scripts/bench hostile"]
fn bench() {
    let modes = FLOODS.iter().copied().chain([("drip", &[][..])]);
    println!(
        "{:>9} {:>26} {:>7} {:>9} {:>9} {:>9} {:>12}",
        "mode", "environment", "verbs", "p50", "p99", "max", "memory"
    );
    for (mode, env) in modes {
        let guest = HostileGuest::start(mode, env);
        let world = world(&guest);
        let (before, until) = (memory_kib(), Instant::now() + Duration::from_secs(10));
        let mut took = Vec::new();
        // A new attack starts when the previous one has ended.
        let mut attack = world.begin::<ExecStart>(exec_request("evil"), vec![]);
        while Instant::now() < until {
            took.extend(verbs(&world).into_iter().map(|(_, t)| t));
            if attack.has_ended() {
                attack = world.begin::<ExecStart>(exec_request("evil"), vec![]);
            }
        }
        attack.hang_up();
        took.sort();
        let at = |percent: usize| took[(took.len() * percent / 100).min(took.len() - 1)];
        let grown = memory_kib().saturating_sub(before);
        println!(
            "{mode:>9} {:>26} {:>7} {:>7}us {:>7}us {:>7}us {:>8} KiB",
            format!("{env:?}").replace('"', ""),
            took.len(),
            at(50).as_micros(),
            at(99).as_micros(),
            at(100).as_micros(),
            grown
        );
        assert!(
            at(99) < Duration::from_millis(50),
            "{mode}: the slowest verb of a hundred took {:?}",
            at(99)
        );
    }
}
