//! Makes tars for tests, including invalid ones.

/// One entry. Fields that a test does not set have plain values.
#[derive(Clone)]
pub(super) struct Item {
    pub(super) path: Vec<u8>,
    pub(super) kind: u8,
    pub(super) mode: u32,
    pub(super) uid: i64,
    pub(super) gid: i64,
    pub(super) mtime: i64,
    pub(super) link: Vec<u8>,
    pub(super) content: Vec<u8>,
    /// The size in the header, if it is not the content's.
    pub(super) size: Option<u64>,
    pub(super) device: [u32; 2],
    pub(super) pax: Vec<(String, Vec<u8>)>,
}

pub(super) const MTIME: i64 = 1_600_000_000;

pub(super) fn item(kind: u8, path: &str) -> Item {
    Item {
        path: path.as_bytes().to_vec(),
        kind,
        mode: if kind == b'5' { 0o755 } else { 0o644 },
        uid: 0,
        gid: 0,
        mtime: MTIME,
        link: Vec::new(),
        content: Vec::new(),
        size: None,
        device: [0, 0],
        pax: Vec::new(),
    }
}

pub(super) fn dir(path: &str) -> Item {
    item(b'5', path)
}

pub(super) fn file(path: &str, content: &str) -> Item {
    let mut item = item(b'0', path);
    item.content = content.as_bytes().to_vec();
    item
}

pub(super) fn symlink(path: &str, target: &str) -> Item {
    let mut item = item(b'2', path);
    item.link = target.as_bytes().to_vec();
    item
}

pub(super) fn hardlink(path: &str, target: &str) -> Item {
    let mut item = item(b'1', path);
    item.link = target.as_bytes().to_vec();
    item
}

pub(super) fn device(kind: u8, path: &str, major: u32, minor: u32) -> Item {
    let mut item = item(kind, path);
    item.device = [major, minor];
    item
}

impl Item {
    pub(super) fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    pub(super) fn mode(self, mode: u32) -> Self {
        self.with(|item| item.mode = mode)
    }

    pub(super) fn owner(self, uid: i64, gid: i64) -> Self {
        self.with(|item| (item.uid, item.gid) = (uid, gid))
    }

    pub(super) fn mtime(self, mtime: i64) -> Self {
        self.with(|item| item.mtime = mtime)
    }

    pub(super) fn pax(self, key: &str, value: &[u8]) -> Self {
        self.with(|item| item.pax.push((key.to_owned(), value.to_vec())))
    }

    pub(super) fn xattr(self, name: &str, value: &[u8]) -> Self {
        self.pax(&format!("SCHILY.xattr.{name}"), value)
    }

    fn write(&self, out: &mut Vec<u8>) {
        if !self.pax.is_empty() {
            let mut extension = item(b'x', "pax");
            extension.content = self.pax.iter().flat_map(|(k, v)| record(k, v)).collect();
            extension.write(out);
        }
        let mut block = [0; 512];
        let name = if self.path.len() > 100 {
            let mut extension = item(b'L', "././@LongLink");
            extension.content = [&self.path[..], b"\0"].concat();
            extension.write(out);
            &self.path[..100]
        } else {
            &self.path[..]
        };
        block[..name.len()].copy_from_slice(name);
        let link = if self.link.len() > 100 {
            let mut extension = item(b'K', "././@LongLink");
            extension.content = [&self.link[..], b"\0"].concat();
            extension.write(out);
            &self.link[..100]
        } else {
            &self.link[..]
        };
        block[157..157 + link.len()].copy_from_slice(link);
        number(&mut block[100..108], i64::from(self.mode));
        number(&mut block[108..116], self.uid);
        number(&mut block[116..124], self.gid);
        let size = self.size.unwrap_or(self.content.len() as u64);
        number(&mut block[124..136], size as i64);
        number(&mut block[136..148], self.mtime);
        block[156] = self.kind;
        block[257..265].copy_from_slice(b"ustar  \0");
        number(&mut block[329..337], i64::from(self.device[0]));
        number(&mut block[337..345], i64::from(self.device[1]));
        seal(&mut block);
        out.extend_from_slice(&block);
        out.extend_from_slice(&self.content);
        out.resize(out.len().next_multiple_of(512), 0);
    }
}

/// Sets the checksum of a header.
pub(super) fn seal(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block[..512].iter().map(|b| u32::from(*b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// Writes an octal number, or one of base 256 if it is negative or too large.
fn number(field: &mut [u8], value: i64) {
    let digits = field.len() - 1;
    if value >= 0 && value < 1 << (3 * digits) {
        field[..digits].copy_from_slice(format!("{value:0digits$o}").as_bytes());
        return;
    }
    let bytes = i128::from(value).to_be_bytes();
    field.copy_from_slice(&bytes[16 - field.len()..]);
    field[0] |= 0x80;
}

pub(super) fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let body = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
    let mut length = body.len() + 1;
    while length != body.len() + length.to_string().len() {
        length += 1;
    }
    [length.to_string().as_bytes(), &body].concat()
}

/// Returns a complete tar.
pub(super) fn tar(items: &[Item]) -> Vec<u8> {
    let mut out = cut_tar(items);
    out.resize(out.len() + 1024, 0);
    out
}

/// Returns a tar without the blocks at its end.
pub(super) fn cut_tar(items: &[Item]) -> Vec<u8> {
    let mut out = Vec::new();
    items.iter().for_each(|item| item.write(&mut out));
    out
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(super) fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(bytes, 1).unwrap()
}
