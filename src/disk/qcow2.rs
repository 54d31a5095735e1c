//! Reads the header and the tables of a qcow2 file (QEMU, docs/interop/qcow2.txt).

use super::read_at::{ReadAt, read};
use super::root::QCOW2_MAGIC;

/// The length of the part of the header that is read. Only version 3 has all of these fields.
pub(super) const HEADER_BYTES: usize = 80;
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 12..=21;
/// The bits of an entry in the L1 or L2 table that contain the offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const L2_COMPRESSED: u64 = 1 << 62;
const L2_ZERO: u64 = 1;
/// The features that change how a file must be read: all but "dirty" and "corrupt".
const INCOMPATIBLE: u64 = !3;
const ENTRY_BYTES: u64 = 8;

pub(super) struct Header {
    cluster_bits: u32,
    l1_entries: u32,
    l1_at: u64,
}

/// The location of a cluster's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cluster {
    /// In the base, because the guest has not written the cluster.
    OfBase,
    Zero,
    /// At this offset in the file.
    At(u64),
    /// In a compressed form, which QEMU writes only when it converts a disk.
    Compressed,
}

/// The offset of an L2 table, which covers one cluster per entry.
#[derive(Clone, Copy)]
pub(super) struct Table(u64);

impl Header {
    /// Reads the header. Returns None if the file is not a qcow2 file, or has a feature that
    /// changes how it must be read, such as a separate file for the data.
    pub(super) fn read(file: &impl ReadAt) -> std::io::Result<Option<Self>> {
        let mut header = [0; HEADER_BYTES];
        read(file, &mut header, 0)?;
        let u32_at =
            |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap_or_default());
        let u64_at =
            |at: usize| u64::from_be_bytes(header[at..at + 8].try_into().unwrap_or_default());
        let (version, cluster_bits) = (u32_at(4), u32_at(20));
        let features = if version >= 3 { u64_at(72) } else { 0 };
        let is_readable = header[..4] == QCOW2_MAGIC
            && CLUSTER_BITS.contains(&cluster_bits)
            && features & INCOMPATIBLE == 0;
        Ok(is_readable.then(|| Self {
            cluster_bits,
            l1_entries: u32_at(36),
            l1_at: u64_at(40),
        }))
    }

    pub(super) fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Returns the number of clusters that an L2 table covers.
    pub(super) fn clusters_per_table(&self) -> u64 {
        self.cluster_bytes() / ENTRY_BYTES
    }

    /// Returns an L2 table, or None if the guest has written nothing in its range.
    pub(super) fn table(&self, file: &impl ReadAt, index: u64) -> std::io::Result<Option<Table>> {
        if index >= u64::from(self.l1_entries) {
            return Ok(None);
        }
        let at = entry(file, self.l1_at, index)? & OFFSET_MASK;
        Ok((at != 0).then_some(Table(at)))
    }

    pub(super) fn cluster(
        &self,
        file: &impl ReadAt,
        table: Table,
        index: u64,
    ) -> std::io::Result<Cluster> {
        let entry = entry(file, table.0, index)?;
        let at = entry & OFFSET_MASK;
        Ok(if entry & L2_COMPRESSED != 0 {
            Cluster::Compressed
        } else if entry & L2_ZERO != 0 {
            Cluster::Zero
        } else if at == 0 {
            Cluster::OfBase
        } else {
            Cluster::At(at)
        })
    }
}

fn entry(file: &impl ReadAt, table_at: u64, index: u64) -> std::io::Result<u64> {
    let mut entry = [0; ENTRY_BYTES as usize];
    read(
        file,
        &mut entry,
        table_at.saturating_add(index * ENTRY_BYTES),
    )?;
    Ok(u64::from_be_bytes(entry))
}
