//! The grammar of image names: a name of this host such as `default`, or a reference to a
//! repository of a registry, such as `gcc:13` or `localhost:5000/team/app@sha256:...` (the file
//! reference/reference.go of the project distribution/reference).
//!
//! Each user has separate names: `@1000/tools` is the image that uid 1000 calls `tools`. Names
//! without an owner are those of the host.

/// The length limit of an image's name without its owner. A directory has this name with the owner,
/// a prefix and a suffix, and the kernel limits a file's name to 255 bytes.
pub(super) const IMAGE_NAME_LEN_MAX: usize = 200;
const TAG_LEN_MAX: usize = 128;
/// The registry of references that name none: Docker Hub.
pub const DEFAULT_REGISTRY: &str = "docker.io";
/// An old name of Docker Hub.
const OLD_DEFAULT_REGISTRY: &str = "index.docker.io";
const DIGEST_PREFIX: &str = "sha256:";
const DIGEST_HEX_LEN: usize = 64;
/// Begins a name that has an owner.
const OWNER_PREFIX: char = '@';
/// Replaces `/` in the name of a directory. No image name contains it.
const SLASH_IN_DIR: &str = "+";

/// The parts of an image's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageNameParts<'a> {
    /// The registry and the repository, or a plain name.
    pub repository: &'a str,
    pub tag: Option<&'a str>,
    pub digest: Option<&'a str>,
}

/// Splits the owner's uid from a name.
pub(super) fn split_owner(name: &str) -> (Option<u32>, &str) {
    let owned = name.strip_prefix(OWNER_PREFIX);
    let owned = owned.and_then(|text| text.split_once('/'));
    match owned.and_then(|(uid, rest)| Some((uid_of(uid)?, rest))) {
        Some((uid, rest)) => (Some(uid), rest),
        None => (None, name),
    }
}

/// Parses a uid. Signs and leading zeros are refused, so that each uid has only one spelling.
fn uid_of(text: &str) -> Option<u32> {
    let is_plain = text == "0" || !text.starts_with(['0', '+']);
    text.parse().ok().filter(|_| is_plain)
}

/// Splits a name into its parts. Returns None if it is not valid.
pub(super) fn parts(name: &str) -> Option<ImageNameParts<'_>> {
    let name = split_owner(name).1;
    let (rest, digest) = match name.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (name, None),
    };
    // A colon before the last slash belongs to the registry's port.
    let last = rest.rfind('/').map_or(0, |slash| slash + 1);
    let (repository, tag) = match rest[last..].find(':') {
        Some(colon) => (&rest[..last + colon], Some(&rest[last + colon + 1..])),
        None => (rest, None),
    };
    let is_valid = name.len() <= IMAGE_NAME_LEN_MAX
        && is_repository(repository)
        && tag.is_none_or(is_tag)
        && digest.is_none_or(is_digest);
    is_valid.then_some(ImageNameParts {
        repository,
        tag,
        digest,
    })
}

pub(super) fn is_valid(name: &str) -> bool {
    parts(name).is_some()
}

/// Returns the name of the directory of the image `name`.
pub(super) fn dir_name(name: &str) -> String {
    name.replace('/', SLASH_IN_DIR)
}

/// Reverses [`dir_name`].
pub(super) fn of_dir_name(dir: &str) -> String {
    dir.replace(SLASH_IN_DIR, "/")
}

/// Splits a reference into its registry and the rest, as docker's `splitDockerDomain` does. fcctl
/// chooses the credential by this registry, and the daemon contacts it for the image, so both must
/// use this function.
pub fn split_registry(reference: &str) -> (&str, &str) {
    match reference.split_once('/') {
        Some((DEFAULT_REGISTRY | OLD_DEFAULT_REGISTRY, rest)) => (DEFAULT_REGISTRY, rest),
        Some((first, rest)) if is_registry(first) => (first, rest),
        _ => (DEFAULT_REGISTRY, reference),
    }
}

/// True if the first component of a reference is a registry.
fn is_registry(first: &str) -> bool {
    first.contains(['.', ':'])
        || first == "localhost"
        || first.bytes().any(|b| b.is_ascii_uppercase())
}

fn is_repository(text: &str) -> bool {
    let path = match text.split_once('/') {
        Some((host, path)) if is_host(host) => path,
        _ => text,
    };
    path.split('/').all(is_component)
}

/// True if the first component is a registry with a valid name.
fn is_host(text: &str) -> bool {
    let (name, port) = match text.split_once(':') {
        Some((name, port)) => (name, Some(port)),
        None => (text, None),
    };
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    is_registry(text)
        && name.split('.').all(is_label)
        && port.is_none_or(|p| (1..=5).contains(&p.len()) && p.bytes().all(|b| b.is_ascii_digit()))
}

/// True for runs of a-z and 0-9, separated by `.`, `_`, `__` or any number of `-`.
fn is_component(text: &str) -> bool {
    let is_word = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    let ends_well = bytes.first().is_some_and(is_word) && bytes.last().is_some_and(is_word);
    let is_separator =
        |run: &[u8]| matches!(run, b"." | b"_" | b"__") || run.iter().all(|b| *b == b'-');
    ends_well
        && bytes
            .split(|b| is_word(b))
            .filter(|run| !run.is_empty())
            .all(is_separator)
}

fn is_tag(text: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    (1..=TAG_LEN_MAX).contains(&text.len())
        && is_word(text.as_bytes()[0])
        && text.bytes().all(|b| is_word(b) || b == b'.' || b == b'-')
}

fn is_digest(text: &str) -> bool {
    text.strip_prefix(DIGEST_PREFIX).is_some_and(|hex| {
        hex.len() == DIGEST_HEX_LEN
            && hex
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owner_is_split_from_name() {
        for (name, owner, rest) in [
            ("tools", None, "tools"),
            ("@1000/tools", Some(1000), "tools"),
            ("@0/localhost:5000/a/b:1", Some(0), "localhost:5000/a/b:1"),
            ("@4294967295/a", Some(u32::MAX), "a"),
        ] {
            assert_eq!(split_owner(name), (owner, rest));
            assert!(is_valid(name), "{name}");
            assert_eq!(of_dir_name(&dir_name(name)), name);
        }
        for bad in [
            "@/a",
            "@1000",
            "@1000/",
            "@01/a",
            "@+1/a",
            "@-1/a",
            "@4294967296/a",
            "@me/a",
            "@1000/@1000/a",
            "@1000/Big",
        ] {
            assert!(!is_valid(bad), "{bad}");
        }
        let longest = "a".repeat(IMAGE_NAME_LEN_MAX);
        assert!(is_valid(&format!("@4294967295/{longest}")));
        assert!(!is_valid(&format!("@1/{longest}a")));
    }

    #[test]
    fn name_is_split_into_its_parts() {
        let digest = format!("sha256:{}", "a".repeat(64));
        let with_digest = format!("localhost:5000/team/app:1@{digest}");
        for (name, repository, tag, found) in [
            ("default", "default", None, None),
            ("gcc:13", "gcc", Some("13"), None),
            ("a--b", "a--b", None, None),
            ("localhost:5000/a", "localhost:5000/a", None, None),
            (
                "ghcr.io/a/b_c:V1.0-x",
                "ghcr.io/a/b_c",
                Some("V1.0-x"),
                None,
            ),
            (
                &with_digest,
                "localhost:5000/team/app",
                Some("1"),
                Some(digest.as_str()),
            ),
        ] {
            let expected = ImageNameParts {
                repository,
                tag,
                digest: found,
            };
            assert_eq!(parts(name), Some(expected), "{name}");
            assert_eq!(of_dir_name(&dir_name(name)), name);
            assert!(!dir_name(name).contains('/'));
        }
    }

    #[test]
    fn registry_is_the_first_component_that_looks_like_a_host() {
        for (reference, registry, rest) in [
            ("gcc:13", DEFAULT_REGISTRY, "gcc:13"),
            ("owner/app", DEFAULT_REGISTRY, "owner/app"),
            ("docker.io/app", DEFAULT_REGISTRY, "app"),
            ("index.docker.io/a/b", DEFAULT_REGISTRY, "a/b"),
            ("ghcr.io/owner/app", "ghcr.io", "owner/app"),
            ("localhost/app", "localhost", "app"),
            ("LOCALHOST/app", "LOCALHOST", "app"),
            ("registry:5000/app:1", "registry:5000", "app:1"),
        ] {
            assert_eq!(split_registry(reference), (registry, rest));
        }
        assert!(is_valid("LOCALHOST/app"));
    }

    #[test]
    fn invalid_names_are_refused() {
        let long = "a".repeat(IMAGE_NAME_LEN_MAX + 1);
        for bad in [
            "",
            "-a",
            "a-",
            "A",
            "a b",
            "a\n",
            "ä",
            "../x",
            "/a",
            "a/",
            "a//b",
            "a/../b",
            "a:",
            "a:-b",
            "a:b:c",
            "a@",
            "a@sha256:12",
            "a..b",
            "a___b",
            "a+b",
            ".a",
            "a/.",
            "host:port/a",
            "a@sha256:x@sha256:y",
            "%2e",
            &long,
        ] {
            assert_eq!(parts(bad), None, "{bad}");
        }
    }
}
