//! The seed drive. It is written at every start, with the results of the earlier steps and the
//! current network configuration. It is in the VM's directory and is removed with it.

use super::super::{Boot, BootStep, Resources};
use crate::daemon::command_defaults;
use crate::daemon::snapshot_registry::Restore;
use crate::disk::RestoreSeed;
use crate::disk::{Seed as Drive, work};
use crate::error::Result;
use crate::host::time::now_s;
use crate::host::{hex, random};
use crate::net::Mac;
use crate::store::VmRow;

const RANDOM_BYTES: usize = 64;

pub(in super::super) struct Seed;

impl BootStep for Seed {
    fn stage(&self) -> &'static str {
        "write the seed drive"
    }

    fn run(&self, resources: &Resources, boot: &mut Boot<'_>) -> Result<()> {
        let (row, spec) = (&boot.row, &boot.spec);
        let (host, user) = resources.keys(row, spec)?;
        boot.restore_seed = boot
            .restore
            .map(|restore| resources.restore_seed(row, restore))
            .transpose()?;
        let image = row
            .shape
            .runtime
            .as_ref()
            .map(|_| command_defaults::settings(&resources.core, row, &boot.image.config))
            .transpose()?;
        let seed = Drive {
            host_name: row
                .host_name
                .as_ref()
                .map_or(row.name.as_str(), |name| name.as_str()),
            network: &resources.networks.seed_network(row)?,
            authorized_keys: &[user.public_line().to_owned()],
            host_key: &host,
            work_disk: spec.work_disk.as_ref().map(|_| work::GUEST_PATH),
            files: &boot.files,
            init: row.shape.init,
            image: image.as_ref(),
            restore: boot.restore_seed.as_ref(),
        };
        seed.write(&spec.seed, spec.credentials)
    }
}

impl Resources {
    /// Returns the seed that a restored guest gets when it resumes.
    pub(super) fn restore_seed(&self, row: &VmRow, restore: &Restore) -> Result<RestoreSeed> {
        Ok(RestoreSeed {
            token: random_hex::<{ RANDOM_BYTES / 4 }>(),
            now_s: now_s(),
            random: random_hex::<RANDOM_BYTES>(),
            // The tap is made later, but its address is known.
            mac: self
                .networks
                .net
                .as_ref()
                .map(|net| net.lease(row.slot).map(|l| Mac::of(l.address).to_string()))
                .transpose()?,
            machine_id: restore.in_other_vm.then(random_hex::<16>),
        })
    }
}

fn random_hex<const BYTES: usize>() -> String {
    hex::encode(&random::bytes::<BYTES>())
}
