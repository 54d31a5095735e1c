//! Tests the `firecracker` driver against a fake with the real program's API
//! (`tests/fake/firecracker/`). A test's script can make the fake slow, hang, die or send wrong
//! answers. The module `firecracker` of the `e2e` tests runs the real program.

mod running;
mod saving;
mod starting;

use fcd::testing::error::Error;
use fcd::testing::ids::{Tag, VmId};
use fcd::testing::locks::Cancel;
use fcd::testing::vmm::console::Consoles;
use fcd::testing::vmm::firecracker::Firecracker;
use fcd::testing::vmm::{Driver, GuestNetwork, Identity, Running, Vm, VmmSpec};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_fake-firecracker");
const SOON: Duration = Duration::from_secs(60);

fn soon() -> Instant {
    Instant::now() + SOON
}

struct Bench {
    dir: tempfile::TempDir,
    /// The installation name in the VMM tags. No other test uses it.
    install: String,
    /// The prefix of the tags with this installation name.
    prefix: String,
    driver: Firecracker,
}

impl Bench {
    fn new(script: &str) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        // The fake reads the script beside its executable, so each test needs its own executable.
        // This is a hard link because a copy would not do: if another test forks while the copy is
        // open for writing, executing it fails (ETXTBSY).
        std::fs::hard_link(PROGRAM, dir.path().join("firecracker")).unwrap();
        std::fs::create_dir(dir.path().join("vm")).unwrap();
        for (name, bytes) in [
            ("vmlinux", b"\x7fELF".as_slice()),
            ("initrd", b"x"),
            ("vm/disk", b"x"),
            ("vm/seed", b"x"),
            ("vm/work", b"x"),
            ("runtime.ext4", b"x"),
        ] {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        let install = VmId::random().as_str()[..8].to_owned();
        let bench = Self {
            driver: driver(dir.path()),
            dir,
            prefix: Tag::prefix(&install),
            install,
        };
        bench.script(script);
        bench
    }

    fn script(&self, script: &str) {
        std::fs::write(self.dir.path().join("script"), script).unwrap();
    }

    fn tag(&self, generation: u64) -> Tag {
        let vm = "0123456789ab".parse().unwrap();
        Tag::new(&self.install, &vm, generation)
    }

    fn vm(&self, running: &Running) -> Box<dyn Vm + '_> {
        let at = self.spec().running_as(&running.identity);
        self.driver.vm(at).unwrap()
    }

    fn spec(&self) -> VmmSpec {
        let path = |name: &str| self.dir.path().join(name);
        let base = fcd::testing::vmm::fake::spec(self.tag(1), self.dir.path());
        VmmSpec {
            dir: path("vm"),
            kernel: path("vmlinux"),
            initrd: path("initrd"),
            boot_args: "root=/dev/vda init=/sbin/fcd-init".into(),
            disk: path("vm/disk"),
            seed: path("vm/seed"),
            runtime_disk: Some(path("runtime.ext4")),
            work_disk: Some(path("vm/work")),
            network: GuestNetwork::Tap {
                name: "fc0011aabb-1".into(),
                mac: "02:fc:0a:59:00:05".into(),
                address: [10, 89, 0, 5].into(),
            },
            ..base
        }
    }

    /// Starts the VM. Returns the result and the process that the driver reported.
    fn start(&self, cancel: &Cancel) -> (fcd::testing::error::Result<Running>, Option<Identity>) {
        let mut reported = None;
        let started = self.driver.start(&self.spec(), cancel, &mut |identity| {
            reported = Some(identity.clone())
        });
        (started, reported)
    }

    fn running(&self) -> Running {
        self.start(&Cancel::try_new().unwrap())
            .0
            .unwrap_or_else(|e| panic!("{e}"))
    }

    /// Checks that the start fails and leaves no process. Returns the error.
    #[track_caller]
    fn fails(&self, cancel: &Cancel) -> Error {
        let (started, reported) = self.start(cancel);
        let e = started.unwrap_err();
        if let Some(identity) = reported {
            assert!(!self.driver.processes().is_alive(&identity), "{e}");
        }
        assert_eq!(
            self.driver.processes().list(&self.prefix).unwrap(),
            [],
            "{e}"
        );
        e
    }

    fn requests(&self) -> String {
        let text = std::fs::read_to_string(self.dir.path().join("requests")).unwrap();
        text.replace(self.dir.path().to_str().unwrap(), "DIR")
    }

    fn console(&self) -> String {
        fcd::testing::vmm::console::read(&self.dir.path().join("vm"), None).unwrap()
    }

    fn await_console(&self, text: &str) {
        let deadline = soon();
        while !self.console().contains(text) {
            assert!(
                Instant::now() < deadline,
                "{text:?} is not in {:?}",
                self.console()
            );
            std::thread::yield_now();
        }
    }
}

/// Kills the VMM if the test ends or fails while the VMM runs.
impl Drop for Bench {
    fn drop(&mut self) {
        for vmm in self
            .driver
            .processes()
            .list(&self.prefix)
            .unwrap_or_default()
        {
            let _ = self.driver.processes().kill(&vmm.identity, soon());
        }
    }
}

fn driver(dir: &Path) -> Firecracker {
    let config = fcd::testing::config::Firecracker {
        binary: dir.join("firecracker"),
        ..Default::default()
    };
    Firecracker::new(config, 0..0, Arc::new(Consoles::try_new().unwrap()))
        .unwrap()
        .without_kvm()
}
