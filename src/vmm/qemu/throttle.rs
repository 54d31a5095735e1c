//! Rate limits of disks. Each disk has its own limits, as in Firecracker. QEMU allows bursts of a
//! tenth of a second's worth.
//!
//! Source: qapi/block-core.json of QEMU 7.2, `query-block` and `block_set_io_throttle`.

use super::qmp::Qmp;
use crate::error::{Error, Kind, Result};
use crate::vmm::VmmSpec;
use serde_json::{Value, json};

/// Sets the limits of every disk that the guest can write.
pub(super) fn set(qmp: &mut Qmp<'_>, spec: &VmmSpec) -> Result<()> {
    let devices = qmp.execute("query-block", &json!({}))?;
    for (node, _) in spec.disks() {
        let none = || {
            Error::new(
                Kind::VmmFailed,
                format!("limit disk {node}: the VMM has no such disk"),
            )
        };
        let device = device_of(&devices, node).ok_or_else(none)?;
        let (bytes, ops) = (
            spec.rates.disk_bytes_per_s.unwrap_or(0),
            spec.rates.disk_ops_per_s.unwrap_or(0),
        );
        let limits = json!({
            "id": device, "bps": bytes, "bps_rd": 0, "bps_wr": 0, "iops": ops, "iops_rd": 0, "iops_wr": 0,
        });
        qmp.execute("block_set_io_throttle", &limits)
            .map_err(|e| e.context(format!("limit disk {node}")))?;
    }
    Ok(())
}

/// Finds the path of the device with this node. The devices have no names of their own.
fn device_of<'a>(devices: &'a Value, node: &str) -> Option<&'a str> {
    let mut all = devices.as_array()?.iter();
    all.find(|device| {
        device
            .pointer("/inserted/node-name")
            .and_then(Value::as_str)
            == Some(node)
    })?
    .get("qdev")?
    .as_str()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_of_disk_is_found_by_node() {
        // This is shortened output of QEMU 7.2.
        let devices = json!([
            {"device": "", "qdev": "/machine/peripheral-anon/device[0]", "inserted": {"node-name": "root", "bps": 0}},
            {"device": "", "qdev": "/machine/peripheral-anon/device[1]", "inserted": {"node-name": "seed"}},
            {"device": "floppy0"},
        ]);
        assert_eq!(
            device_of(&devices, "seed"),
            Some("/machine/peripheral-anon/device[1]")
        );
        for (devices, node) in [
            (devices, "work"),
            (json!({}), "root"),
            (json!([{"inserted": {"node-name": "root"}}]), "root"),
        ] {
            assert_eq!(device_of(&devices, node), None);
        }
    }
}
