//! Configures a VMM before its guest runs.

use super::api::{
    self, BootSource, Booted, CacheType, Drive, LoadSnapshot, MachineConfig, NetworkInterface,
    NetworkOverride, PreBoot, Vsock,
};
use super::pipes::{CONSOLE_PIPE, METRICS_PIPE};
use super::rates::RateLimiter;
use super::spawn::{Files, SavedFiles};
use super::vsock;
use crate::error::{Error, Kind, Result};
use crate::vmm::{DiskFormat, GuestNetwork, VmmSpec};
use std::net::{Ipv4Addr, SocketAddr};

/// The name of the guest's network interface.
const INTERFACE: &str = "eth0";
/// The kernel arguments that follow the spec's `boot_args`. `reboot=k` makes the guest reset when
/// it powers off, because only a reset ends the VMM (docs/getting-started.md).
const KERNEL_ARGS: &str = "console=ttyS0 reboot=k i8042.noaux i8042.nomux fcd.off=reset";

/// Configures a guest that boots, and returns the address of its SSH server. The guest numbers its
/// disks in the order in which they are added.
pub(super) fn configure(
    vmm: &mut PreBoot<'_>,
    spec: &VmmSpec,
    files: &Files,
) -> Result<SocketAddr> {
    let (name, address) = tap(spec)?;
    let GuestNetwork::Tap { mac, .. } = &spec.network else {
        return Err(Error::internal("the guest has no tap"));
    };
    if spec.disk_format == DiskFormat::Qcow2 {
        return Err(Error::new(
            Kind::Unsupported,
            "start the VMM: firecracker cannot read this VM's qcow2 disk",
        )
        .hint("set driver = \"qemu\" under [vmm] for it, or create a new VM"));
    }
    vmm.machine(&MachineConfig {
        vcpu_count: spec.vcpus,
        mem_size_mib: spec.mem_mib,
    })?;
    let boot_args = format!("{} {KERNEL_ARGS}", spec.boot_args.trim());
    vmm.boot_source(&BootSource {
        kernel_image_path: &files.kernel,
        initrd_path: &files.initrd,
        boot_args: &boot_args,
    })?;
    let runtime = files.runtime.as_deref().map(|path| ("runtime", path));
    let work = files.work.as_deref().map(|path| ("work", path));
    let rates = &spec.rates;
    let limiter = RateLimiter::new(rates.disk_bytes_per_s, rates.disk_ops_per_s);
    for (drive_id, path_on_host) in [("root", files.disk.as_str()), ("seed", &files.seed)]
        .into_iter()
        .chain(runtime)
        .chain(work)
    {
        let is_read_only = matches!(drive_id, "seed" | "runtime");
        vmm.drive(&Drive {
            drive_id,
            path_on_host,
            is_root_device: drive_id == "root",
            is_read_only,
            cache_type: CacheType::Writeback,
            rate_limiter: limiter.filter(|_| !is_read_only),
        })?;
    }
    vmm.network(&NetworkInterface {
        iface_id: INTERFACE,
        host_dev_name: name,
        guest_mac: mac,
        rx_rate_limiter: RateLimiter::new(rates.net_rx_bytes_per_s, None),
        tx_rate_limiter: RateLimiter::new(rates.net_tx_bytes_per_s, None),
    })?;
    vmm.entropy()?;
    vmm.vsock(&Vsock {
        guest_cid: vsock::GUEST_CID,
        uds_path: vsock::SOCKET,
    })?;
    if spec.has_balloon {
        vmm.balloon()?;
    }
    vmm.serial(CONSOLE_PIPE)?;
    vmm.metrics(METRICS_PIPE)?;
    Ok(api::ssh_addr(address))
}

/// Loads and resumes a saved guest, whose disks and console keep their paths, and sets its rates.
/// Returns the address of the guest's SSH server.
pub(super) fn load(mut vmm: PreBoot<'_>, spec: &VmmSpec, saved: &SavedFiles) -> Result<SocketAddr> {
    let (tap, address) = tap(spec)?;
    vmm.serial(CONSOLE_PIPE)?;
    vmm.metrics(METRICS_PIPE)?;
    let mut vmm = vmm.load(&LoadSnapshot::new(
        &saved.devices,
        &saved.memory,
        &[NetworkOverride {
            iface_id: INTERFACE,
            host_dev_name: tap,
        }],
    ))?;
    // Set the current rates, because the saved state contains the rates that applied when the guest
    // was saved.
    limit(&mut vmm, spec)?;
    Ok(api::ssh_addr(address))
}

/// Sets the rates of a guest that runs or was just loaded.
pub(super) fn limit(vmm: &mut Booted<'_>, spec: &VmmSpec) -> Result<()> {
    let rates = &spec.rates;
    for (disk, _) in spec.disks() {
        vmm.drive_rates(disk, rates.disk_bytes_per_s, rates.disk_ops_per_s)?;
    }
    vmm.network_rates(
        INTERFACE,
        rates.net_rx_bytes_per_s,
        rates.net_tx_bytes_per_s,
    )
}

fn tap(spec: &VmmSpec) -> Result<(&str, Ipv4Addr)> {
    match &spec.network {
        GuestNetwork::Tap { name, address, .. } => Ok((name, *address)),
        GuestNetwork::UserMode { .. } => Err(Error::new(
            Kind::Unsupported,
            "start the VMM: firecracker has no user-mode network",
        )
        .hint("set driver = \"bridge\" under [network], or driver = \"qemu\" under [vmm]")),
    }
}
