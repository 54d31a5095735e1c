//! Checks of ELF files that a user or a distribution provides.

/// `e_machine` of x86-64 (elf(5)).
const EM_X86_64: u16 = 62;
/// The types of a relocatable file, an executable and a position-independent file.
pub(super) const ET_REL: u16 = 1;
pub(super) const ET_EXEC: u16 = 2;
pub(super) const ET_DYN: u16 = 3;
/// The sizes of `Elf64_Ehdr` and `Elf64_Phdr`.
const EHDR_BYTES: usize = 64;
const PHDR_BYTES: usize = 56;

/// True if it is an ELF file of one of these types for x86-64.
pub(super) fn is_elf(bytes: &[u8], types: &[u16]) -> bool {
    let u16_at = |at: usize| {
        bytes
            .get(at..at + 2)
            .map(|b| u16::from_le_bytes([b[0], b[1]]))
    };
    let is_ours = bytes.starts_with(b"\x7fELF\x02\x01") && u16_at(18) == Some(EM_X86_64);
    is_ours && u16_at(16).is_some_and(|t| types.contains(&t)) && bytes.len() > EHDR_BYTES
}

/// True if the file contains all of its loadable segments (elf(5), `Elf64_Phdr`).
pub(super) fn is_whole(elf: &[u8]) -> bool {
    let number = |at: usize, len: usize| {
        let bytes = at.checked_add(len).and_then(|end| elf.get(at..end))?;
        usize::try_from(bytes.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b))).ok()
    };
    let headers = || {
        let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        (size == PHDR_BYTES && count > 0).then_some(())?;
        (0..count)
            .map(|n| table.checked_add(n * PHDR_BYTES))
            .collect::<Option<Vec<usize>>>()
    };
    let ends = |at: usize| {
        let header = elf.get(at..at.checked_add(PHDR_BYTES)?).map(|_| at)?;
        number(header + 8, 8)?.checked_add(number(header + 32, 8)?)
    };
    headers().is_some_and(|all| {
        all.into_iter()
            .all(|at| ends(at).is_some_and(|end| end <= elf.len()))
    })
}
