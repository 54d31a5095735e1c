//! Talks to a running VMM about its guest.

use super::qmp::Qmp;
use super::{argv, forward, pause, save, throttle};
use crate::api::port::Port;
use crate::error::{Error, Kind, Result};
use crate::host::process::Process;
use crate::locks::{Cancel, Rank, region};
use crate::sched::Instant;
use crate::vmm::dial::{self, Deadline};
use crate::vmm::{SaveTo, Vm, VmRef, VmmSpec, run_dir};
use serde_json::json;
use std::os::unix::net::UnixStream;

/// A running VM of QEMU.
pub(super) struct QemuVm {
    pub at: VmRef,
}

impl QemuVm {
    /// Runs one conversation with the VMM.
    fn talk<T>(
        &self,
        doing: &str,
        deadline: Deadline<'_>,
        ask: impl FnOnce(&mut Qmp<'_>) -> Result<T>,
    ) -> Result<T> {
        let gone = || Error::new(Kind::VmmFailed, format!("{doing}: the VMM has exited"));
        let process = Process::open(&self.at.identity)?.ok_or_else(gone)?;
        let _blocking = region(Rank::VmmApi);
        let run = run_dir::open(&self.at.dir, doing)?;
        let control =
            dial::connect(&run, argv::CONTROL_SOCKET, &process, deadline)?.ok_or_else(gone)?;
        Qmp::open(control, deadline)
            .and_then(|mut qmp| ask(&mut qmp))
            .map_err(|e| e.context(doing))
    }
}

fn soon(cancel: &Cancel) -> Deadline<'_> {
    Deadline {
        at: Instant::now() + super::ANSWER_DEADLINE,
        cancel,
    }
}

impl Vm for QemuVm {
    fn pause(&self, cancel: &Cancel) -> Result<()> {
        self.talk("pause the guest", soon(cancel), pause::pause)
    }

    fn resume(&self, cancel: &Cancel) -> Result<()> {
        self.talk("resume the guest", soon(cancel), pause::resume)
    }

    fn save(&self, _spec: &VmmSpec, to: SaveTo<'_>, cancel: &Cancel) -> Result<String> {
        let deadline = Deadline {
            at: Instant::now() + save::DEADLINE,
            cancel,
        };
        let saved = self.talk("save the guest", deadline, |qmp| {
            save::save(qmp, to.memory)?;
            save::version(qmp)
        });
        if saved.is_err() {
            // Use another cancel token, because the first one may have fired.
            let never = Cancel::try_new().map_err(|e| Error::io("save the guest", e))?;
            let doing = "cancel saving the guest";
            if let Err(e) = self.talk(doing, soon(&never), save::cancel_migration) {
                log::warn!("{e}");
            }
        }
        saved
    }

    fn set_rates(&self, spec: &VmmSpec, cancel: &Cancel) -> Result<()> {
        self.talk("limit the guest's disks", soon(cancel), |qmp| {
            throttle::set(qmp, spec)
        })
    }

    fn set_balloon(&self, keep_mib: u64, cancel: &Cancel) -> Result<()> {
        let value = json!({ "value": keep_mib << 20 });
        self.talk("set the balloon", soon(cancel), |qmp| {
            qmp.execute("balloon", &value).map(drop)
        })
    }

    fn balloon_mib(&self, cancel: &Cancel) -> Result<u64> {
        let doing = "read the size of the balloon";
        let answer = self.talk(doing, soon(cancel), |qmp| {
            qmp.execute("query-balloon", &json!({}))
        })?;
        let bytes = answer["actual"].as_u64();
        bytes.map(|b| b >> 20).ok_or_else(|| {
            Error::new(
                Kind::VmmFailed,
                format!("{doing}: the answer contains no size"),
            )
        })
    }

    fn metrics(&self, cancel: &Cancel) -> Result<Vec<serde_json::Value>> {
        const COMMAND: &str = "query-blockstats";
        let stats = self.talk("read the VMM's metrics", soon(cancel), |qmp| {
            qmp.execute(COMMAND, &json!({}))
        })?;
        Ok(vec![json!({ COMMAND: stats })])
    }

    fn forward(&self, add: &[Port], remove: &[Port], cancel: &Cancel) -> Result<()> {
        self.talk("change the guest's ports", soon(cancel), |qmp| {
            forward::change(qmp, add, remove)
        })
    }

    fn forwarded(&self, cancel: &Cancel) -> Result<Vec<Port>> {
        self.talk("list the guest's ports", soon(cancel), forward::list)
    }

    /// Fails, because QEMU supports vsock only through the host's kernel (vhost-vsock), where CIDs
    /// are shared by the whole host.
    fn connect(&self, _port: u32, _cancel: &Cancel) -> Result<UnixStream> {
        Err(
            Error::new(Kind::Unsupported, "guests of QEMU have no vsock")
                .hint("publish a port of the guest's network instead: fcctl run -p PORT"),
        )
    }
}
