//! The fields of a message between a helper and its parent: fixed-width numbers and length-prefixed
//! bytes.

/// Appends fields to a message, which begins with a tag.
#[derive(Debug)]
pub struct Writer(Vec<u8>);

impl Writer {
    pub fn new(tag: u8) -> Self {
        Self(vec![tag])
    }
    pub fn byte(mut self, byte: u8) -> Self {
        self.0.push(byte);
        self
    }
    pub fn short(mut self, number: u16) -> Self {
        self.0.extend(number.to_le_bytes());
        self
    }
    pub fn word(mut self, number: u32) -> Self {
        self.0.extend(number.to_le_bytes());
        self
    }
    pub fn bytes(self, bytes: &[u8]) -> Self {
        // The callers limit the length of each field, and the channel rejects a message that is too
        // long.
        let mut with_len = self.word(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        with_len.0.extend(bytes);
        with_len
    }
    pub fn finish(self) -> Vec<u8> {
        self.0
    }
}

/// Reads fields from a message. Each method returns None if the message is malformed.
#[derive(Debug)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub fn new(message: &'a [u8]) -> Self {
        Self(message)
    }
    pub fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }
    pub fn byte(&mut self) -> Option<u8> {
        Some(self.take(1)?[0])
    }
    pub fn flag(&mut self) -> Option<bool> {
        match self.byte()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }
    pub fn short(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.take(2)?.try_into().ok()?))
    }
    pub fn word(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }
    pub fn bytes(&mut self) -> Option<&'a [u8]> {
        let len = self.word()?;
        self.take(usize::try_from(len).ok()?)
    }
    pub fn text(&mut self) -> Option<String> {
        String::from_utf8(self.bytes()?.to_vec()).ok()
    }
    /// Checks that the whole message has been read. Returns None if it has further bytes.
    pub fn end(self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}
