//! Checks of ELF files that a user or a distribution provides.

use object::LittleEndian;
use object::elf::{EM_X86_64, FileHeader64, FileType};
use object::read::elf::{FileHeader, ProgramHeader};

type Header = FileHeader64<LittleEndian>;

/// True if `bytes` are an ELF file for x86-64 of one of these types.
pub(super) fn is_elf(bytes: &[u8], types: &[FileType]) -> bool {
    header_of(bytes).is_some_and(|header| {
        header.e_machine(LittleEndian) == EM_X86_64 && types.contains(&header.e_type(LittleEndian))
    })
}

/// True if the file has at least one segment and contains all of them.
pub(super) fn is_whole(elf: &[u8]) -> bool {
    let segments = header_of(elf).map(|header| header.program_headers(LittleEndian, elf));
    let Some(Ok(segments)) = segments else {
        return false;
    };
    !segments.is_empty() && segments.iter().all(|s| s.data(LittleEndian, elf).is_ok())
}

fn header_of(bytes: &[u8]) -> Option<&Header> {
    let header = Header::parse(bytes).ok()?;
    // This fails if the file is big-endian.
    header.endian().ok()?;
    Some(header)
}
