//! Newtypes for names and ids, which are validated when they are parsed.

mod image_name;
mod labels;

pub use image_name::{DEFAULT_REGISTRY, ImageNameParts, split_registry};
pub use labels::Labels;

use crate::error::{Error, Kind, Result};
use crate::host::text::quoted;
use crate::host::{hex, random};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Maximum length of the name of a VM, a kernel or a snapshot.
pub const NAME_LEN_MAX: usize = 32;
/// Maximum length of the host name of a guest. The kernel's limit is one more (uname(2)).
const HOST_NAME_LEN_MAX: usize = 63;
/// The tag of an image whose name does not give one, as in docker.
pub const DEFAULT_TAG: &str = "latest";
/// The number of hexadecimal digits in an id.
pub const ID_LEN: usize = 12;

fn name_is_valid(s: &str) -> bool {
    let bytes = s.as_bytes();
    !bytes.is_empty()
        && bytes.len() <= NAME_LEN_MAX
        && bytes[0].is_ascii_lowercase()
        && bytes[bytes.len() - 1] != b'-'
        && bytes
            .iter()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
}

/// Accepts what Linux and DNS accept: names of letters, digits and `-`, with dots in between.
fn host_name_is_valid(s: &str) -> bool {
    let is_end = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    s.len() <= HOST_NAME_LEN_MAX
        && s.split('.').all(|part| {
            let bytes = part.as_bytes();
            is_end(bytes.first())
                && is_end(bytes.last())
                && bytes
                    .iter()
                    .all(|b| b.is_ascii_alphanumeric() || *b == b'-')
        })
}

fn id_is_valid(s: &str) -> bool {
    s.len() == ID_LEN
        && s.bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

fn random_id() -> String {
    hex::encode(&random::bytes::<{ ID_LEN / 2 }>())
}

macro_rules! text_newtype {
    ($(#[$doc:meta])* $name:ident, $valid:path, $what:literal, $form:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String")]
        pub struct $name(String);
        impl $name {
            pub fn as_str(&self) -> &str { &self.0 }
        }
        // Required by `Borrow`: the derived order, equality and hash are those of the text.
        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str { &self.0 }
        }
        impl FromStr for $name {
            type Err = Error;
            fn from_str(s: &str) -> Result<Self> { s.to_owned().try_into() }
        }
        impl TryFrom<String> for $name {
            type Error = Error;
            fn try_from(s: String) -> Result<Self> {
                if $valid(&s) { return Ok(Self(s)); }
                Err(Error::new(Kind::InvalidArgument, format!(concat!($what, " {} is not valid"), quoted(&s))).hint($form))
            }
        }
        impl From<$name> for String { fn from(v: $name) -> String { v.0 } }
        impl fmt::Display for $name { fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.write_str(&self.0) } }
        impl fmt::Debug for $name { fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.write_str(&self.0) } }
        impl AsRef<str> for $name { fn as_ref(&self) -> &str { &self.0 } }
    };
}

text_newtype!(
    /// A VM's id: 48 random bits as 12 hexadecimal digits.
    VmId, id_is_valid, "VM id", "an id has 12 hexadecimal digits"
);
text_newtype!(
    /// An operation's id, in the form of a [`VmId`].
    OpId, id_is_valid, "operation id", "an id has 12 hexadecimal digits"
);
text_newtype!(
    /// The id of an exec session, in the form of a [`VmId`].
    SessionId, id_is_valid, "session id", "an id has 12 hexadecimal digits"
);
text_newtype!(
    /// A VM's name, unique on the host: a lower-case DNS label of at most 32 characters.
    VmName, name_is_valid, "VM name",
    "use 1 to 32 characters from a-z, 0-9 and -; begin with a letter and do not end with -"
);
text_newtype!(
    /// The name of an image of this host. It has the form of a reference to a registry. If the name
    /// belongs to a user, the user's uid precedes it: `@1000/tools`.
    ImageRef, image_name::is_valid, "image name",
    "use a name such as tools, gcc:13 or ghcr.io/owner/app:tag, of at most 200 characters"
);

impl ImageRef {
    pub fn parts(&self) -> ImageNameParts<'_> {
        image_name::parts(&self.0).expect("validated when it was parsed")
    }

    /// Returns the uid of the user to whom this name belongs, or None for a name of the host.
    pub fn owner(&self) -> Option<u32> {
        image_name::split_owner(&self.0).0
    }

    /// Returns the name without its owner.
    pub fn without_owner(&self) -> Self {
        Self(image_name::split_owner(&self.0).1.to_owned())
    }

    /// Returns the same name as a name of this user.
    pub fn owned_by(&self, uid: u32) -> Self {
        Self(format!("@{uid}/{}", self.without_owner()))
    }

    /// Returns the name as this user writes it: without the owner if that is the user.
    pub fn said_by(&self, uid: u32) -> Self {
        if self.owner() == Some(uid) {
            return self.without_owner();
        }
        self.clone()
    }

    /// Returns the name of the image's directory.
    pub fn dir_name(&self) -> String {
        image_name::dir_name(&self.0)
    }

    /// Returns the image whose directory has this name. Returns None if there cannot be one.
    pub fn of_dir_name(dir: &str) -> Option<Self> {
        image_name::of_dir_name(dir).parse().ok()
    }

    /// Returns the same name with the tag `latest` if the name has neither a tag nor a digest.
    pub fn with_default_tag(&self) -> Self {
        match self.parts() {
            ImageNameParts {
                tag: None,
                digest: None,
                ..
            } => Self(format!("{}:{DEFAULT_TAG}", self.0)),
            _ => self.clone(),
        }
    }
}

text_newtype!(
    /// The name of a kernel in the registry of this host.
    KernelName, name_is_valid, "kernel name",
    "use 1 to 32 characters from a-z, 0-9 and -; begin with a letter and do not end with -"
);
text_newtype!(
    /// The id of a guest runtime: the beginning of a digest of its content, in the form of a
    /// [`VmId`].
    RuntimeId, id_is_valid, "guest runtime id", "an id has 12 hexadecimal digits"
);
text_newtype!(
    /// The id of a snapshot, in the form of a [`VmId`].
    SnapshotId, id_is_valid, "snapshot id", "an id has 12 hexadecimal digits"
);
text_newtype!(
    /// A snapshot's name, unique on the host.
    SnapshotName, name_is_valid, "snapshot name",
    "use 1 to 32 characters from a-z, 0-9 and -; begin with a letter and do not end with -"
);

text_newtype!(
    /// The host name of a guest.
    HostName, host_name_is_valid, "host name",
    "use at most 63 letters, digits and -, with dots in between, such as build-1 or ci.example.com"
);
text_newtype!(
    /// The key of a label.
    LabelKey, labels::is_key, "label key",
    "use at most 128 letters, digits, and . _ - / in between, such as ci or com.example/owner"
);
text_newtype!(
    /// The value of a label. It may be empty.
    LabelValue, labels::is_value, "label value",
    "use at most 1024 bytes of text without control characters"
);

macro_rules! random_ids {
    ($($name:ident),*) => { $(impl $name { pub fn random() -> Self { Self(random_id()) } })* };
}
random_ids!(VmId, OpId, SessionId, SnapshotId);

/// The name of one boot of a VM on the host: `fc-<install>-<vm>-<generation>`. Processes, taps,
/// control groups and devices carry it, so that a later daemon finds them again.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Tag {
    text: String,
    vm: VmId,
    generation: u64,
}

impl Tag {
    pub fn new(install: &str, vm: &VmId, generation: u64) -> Self {
        Self {
            text: format!("{}{generation}", Self::prefix_of_vm(install, vm)),
            vm: vm.clone(),
            generation,
        }
    }

    /// Returns the beginning of every tag of an installation.
    pub fn prefix(install: &str) -> String {
        format!("fc-{install}-")
    }

    /// Returns the beginning of every tag of a VM.
    pub fn prefix_of_vm(install: &str, vm: &VmId) -> String {
        format!("{}{vm}-", Self::prefix(install))
    }

    pub fn install(&self) -> &str {
        self.text.split('-').nth(1).unwrap_or_default()
    }

    pub fn vm(&self) -> &VmId {
        &self.vm
    }

    pub fn generation(&self) -> u64 {
        self.generation
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl FromStr for Tag {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        let parse = || {
            let (install, rest) = s.strip_prefix("fc-")?.split_once('-')?;
            let (vm, generation) = rest.split_once('-')?;
            let tag = Self::new(install, &vm.parse().ok()?, generation.parse().ok()?);
            (tag.text == s).then_some(tag)
        };
        parse().ok_or_else(|| Error::internal(format!("{s:?} is not a VM's tag")))
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tag_is_parsed_into_its_parts() {
        let vm: VmId = "0123456789ab".parse().unwrap();
        let tag = Tag::new("1a2b3c4d", &vm, 12);
        assert_eq!(tag.as_str(), "fc-1a2b3c4d-0123456789ab-12");
        assert_eq!(tag.as_str().parse::<Tag>().unwrap(), tag);
        assert_eq!(
            (tag.install(), tag.vm(), tag.generation()),
            ("1a2b3c4d", &vm, 12)
        );
        for bad in [
            "",
            "fc-x",
            "fc-x-0123456789ab",
            "fc-x-0123456789ab-",
            "fc-x-0123456789ab-01",
            "fc-x-0123456789ab-+1",
            "fc-x-0123456789ab-1-",
            "fc-x-y-0123456789ab-1",
            "fc-x-0123456789-1",
            "xfc-x-0123456789ab-1",
        ] {
            assert!(bad.parse::<Tag>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_are_validated() {
        for good in ["a", "web", "brave-otter", "a1", &"a".repeat(32)] {
            assert!(good.parse::<VmName>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "-a",
            "a-",
            "1a",
            "A",
            "a_b",
            "a.b",
            "a b",
            "a\n",
            "ä",
            "../x",
            &"a".repeat(33),
        ] {
            assert!(bad.parse::<VmName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn host_names_are_validated() {
        for good in ["a", "Build-1", "ci.example.com", "1", &"a".repeat(63)] {
            assert!(good.parse::<HostName>().is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "a.",
            ".a",
            "a..b",
            "-a",
            "a-",
            "a_b",
            "a b",
            "a\n",
            "ä",
            &"a".repeat(64),
        ] {
            assert!(bad.parse::<HostName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ids_round_trip_and_differ() {
        let id = VmId::random();
        assert_eq!(id.as_str().parse::<VmId>().unwrap(), id);
        assert_ne!(VmId::random(), id);
        assert!("0123456789AB".parse::<VmId>().is_err());
        assert!("0123".parse::<VmId>().is_err());
    }

    #[test]
    fn deserialize_invalid_name_is_rejected() {
        assert!(serde_json::from_str::<VmName>("\"web\"").is_ok());
        let e = serde_json::from_str::<VmName>("\"../x\"")
            .unwrap_err()
            .to_string();
        assert!(e.contains("VM name"), "{e}");
    }
}
