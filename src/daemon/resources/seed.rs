//! The seed drive, written at every start: what the steps before it have found out, and the network, which may have changed. It lies in
//! the VM's directory and goes with it.

use super::{Resource, Span};
use crate::daemon::Daemon;
use crate::daemon::boot::Boot;
use crate::disk::{Seed as Drive, work};
use crate::error::Result;
use crate::store::VmRow;

pub(super) struct Seed;

impl Resource for Seed {
    fn kind(&self) -> &'static str {
        "seed"
    }
    fn span(&self) -> Span {
        Span::Boot
    }
    fn intent(&self, _daemon: &Daemon, _row: &VmRow) -> Option<String> {
        None
    }
    fn doing(&self) -> &'static str {
        "write the seed"
    }

    fn acquire(&self, daemon: &Daemon, boot: &mut Boot<'_>) -> Result<()> {
        let (row, spec) = (&boot.row, &boot.spec);
        let (host, user) = daemon.keys(row, spec)?;
        boot.wake = boot.claim.restore.as_ref().map(|restore| daemon.wake(row, restore)).transpose()?;
        let seed = Drive {
            host_name: &row.name,
            network: &daemon.seed_network(row)?,
            authorized_keys: &[user.public_line().to_owned()],
            host_key: &host,
            work_disk: spec.work_disk.as_ref().map(|_| work::GUEST_PATH),
            files: &boot.files,
            restore: boot.wake.as_ref(),
        };
        seed.write(&spec.seed, spec.credentials)
    }

    fn release(&self, _daemon: &Daemon, _name: &str) -> Result<()> {
        Ok(())
    }
    fn found(&self, _daemon: &Daemon) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}
