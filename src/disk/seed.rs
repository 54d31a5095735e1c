//! The seed drive, a read-only disk that contains a tar archive with a guest's identity and
//! settings.
//!
//! Its members are `config`, `host_key` (an OpenSSH private key), `authorized_keys`, `image` if the
//! guest boots with a guest runtime, and `files.tar` if there are files. `config` has lines
//! `key=value` with `host_name`, `address`, `gateway`, `address6` and `gateway6` if the guest has
//! IPv6, any number of `dns`, `work_disk`, the mount point of the last disk, and `init=image` if
//! the image's own init is to run. For a restored guest, it also has the values of [`RestoreSeed`].
//! The guest's init reads the drive at every boot.

use super::Draft;
use crate::api::image::ImageConfig;
use crate::api::vm::Init;
use crate::error::{Error, Kind, Result};
use crate::host::{Credentials, random};
use ssh_key::{Algorithm, LineEnding, PrivateKey, rand_core};
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A drive's length is a multiple of this number of bytes. A restored guest gets a new drive but
/// still assumes the length of the old one.
pub const UNIT_BYTES: usize = 16 << 10;

/// The IPv6 settings of a guest's interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetworkIpv6 {
    pub address: Ipv6Addr,
    /// The length of the network's prefix in bits.
    pub prefix: u8,
    pub gateway: Option<Ipv6Addr>,
}

/// The settings of a guest's only interface, `eth0`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    pub address: IpAddr,
    /// The length of the network's prefix in bits.
    pub prefix: u8,
    pub gateway: Option<IpAddr>,
    /// None if the guest has no IPv6. A guest whose init is older than version 6 ignores it.
    pub ipv6: Option<NetworkIpv6>,
    pub dns: Vec<IpAddr>,
}

impl Network {
    /// Returns the settings for QEMU's default user-mode network ("Using the user mode network
    /// stack" in QEMU's documentation).
    pub fn user_mode() -> Self {
        Self {
            address: Ipv4Addr::new(10, 0, 2, 15).into(),
            prefix: 24,
            gateway: Some(Ipv4Addr::new(10, 0, 2, 2).into()),
            ipv6: None,
            dns: vec![Ipv4Addr::new(10, 0, 2, 3).into()],
        }
    }

    /// Returns the settings for QEMU's user-mode network with IPv6. `has_resolver` says whether the
    /// host has a resolver with an IPv6 address, because QEMU's second name server forwards only to
    /// such a resolver.
    pub fn user_mode_with_ipv6(has_resolver: bool) -> Self {
        let of = |host| Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, host);
        let ipv4 = Self::user_mode();
        let resolver = has_resolver.then(|| of(3).into());
        Self {
            ipv6: Some(NetworkIpv6 {
                address: of(0x15),
                prefix: 64,
                gateway: Some(of(2)),
            }),
            dns: ipv4.dns.into_iter().chain(resolver).collect(),
            ..ipv4
        }
    }
}

/// The content of a seed drive.
#[derive(Clone, Debug)]
pub struct Seed<'a> {
    pub host_name: &'a str,
    pub network: &'a Network,
    /// The public keys that can log in as root, in the format of `authorized_keys`.
    pub authorized_keys: &'a [String],
    /// The guest's own host key.
    pub host_key: &'a KeyPair,
    /// The mount point of the guest's work disk, if it has one.
    pub work_disk: Option<&'a str>,
    /// Files that the guest copies over its own at boot.
    pub files: &'a [SeedFile],
    /// The first process of the guest.
    pub init: Init,
    /// The settings of the image's commands, for a guest that boots with a guest runtime.
    pub image: Option<&'a ImageConfig>,
    /// Set if the guest is restored instead of booted.
    pub restore: Option<&'a RestoreSeed>,
}

/// The values that a restored guest has to update. `src/guest/rejoin.sh` reads them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoreSeed {
    /// A hexadecimal token, new for each start, with which the guest confirms that it has read this
    /// seed.
    pub token: String,
    /// The current time of the host, in seconds since the epoch.
    pub now_s: u64,
    /// A hexadecimal seed for the guest's random number generator.
    pub random: String,
    /// The new Ethernet address of the guest's interface, if the host assigns one.
    pub mac: Option<String>,
    /// A new machine-id(5), if the guest is a clone.
    pub machine_id: Option<String>,
}

/// A file for the guest, owned by root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeedFile {
    /// The absolute path in the guest, without `..`.
    pub path: PathBuf,
    pub mode: u32,
    /// The modification time of the file, in seconds since the epoch.
    pub mtime_s: u64,
    pub bytes: Vec<u8>,
}

impl Seed<'_> {
    /// Writes the drive with mode 0600. After a crash it is either complete or absent. `owner` is
    /// the uid and gid of the VMM.
    pub fn write(&self, path: &Path, owner: Option<Credentials>) -> Result<()> {
        crate::locks::may_block("file access");
        let bytes = self.tar()?;
        let draft = Draft::new(path)?;
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&draft.path)
            .map_err(|e| Error::io(format!("create seed drive {}", path.display()), e))?;
        file.write_all(&bytes)
            .map_err(|e| Error::io(format!("write seed drive {}", path.display()), e))?;
        draft.publish(owner)
    }

    /// Packs the archive. The same seed produces the same bytes. The length is a multiple of
    /// [`UNIT_BYTES`].
    fn tar(&self) -> Result<Vec<u8>> {
        let mut keys = String::new();
        for key in self.authorized_keys {
            if key.contains(['\n', '\r']) || key.trim().is_empty() {
                return Err(Error::invalid("an authorized key must be one line"));
            }
            let _ = writeln!(keys, "{key}");
        }
        let mut tar = tar::Builder::new(Vec::new());
        for (name, mode, text) in [
            ("config", 0o644, self.config()),
            (
                "host_key",
                0o600,
                self.host_key.private_openssh().to_owned(),
            ),
            ("authorized_keys", 0o644, keys),
        ] {
            append(&mut tar, Path::new(name), mode, 0, text.as_bytes())?;
        }
        if let Some(image) = self.image {
            append(
                &mut tar,
                Path::new("image"),
                0o644,
                0,
                &image_settings(image)?,
            )?;
        }
        if !self.files.is_empty() {
            append(
                &mut tar,
                Path::new("files.tar"),
                0o600,
                0,
                &files_tar(self.files)?,
            )?;
        }
        let mut bytes = tar
            .into_inner()
            .map_err(|e| Error::io("pack the seed drive", e))?;
        bytes.resize(bytes.len().next_multiple_of(UNIT_BYTES), 0);
        Ok(bytes)
    }

    fn config(&self) -> String {
        let net = self.network;
        let mut text = format!(
            "host_name={}\naddress={}/{}\n",
            self.host_name, net.address, net.prefix
        );
        if let Some(gateway) = net.gateway {
            let _ = writeln!(text, "gateway={gateway}");
        }
        if let Some(ipv6) = &net.ipv6 {
            let _ = writeln!(text, "address6={}/{}", ipv6.address, ipv6.prefix);
            if let Some(gateway) = ipv6.gateway {
                let _ = writeln!(text, "gateway6={gateway}");
            }
        }
        for server in &net.dns {
            let _ = writeln!(text, "dns={server}");
        }
        if let Some(path) = self.work_disk {
            let _ = writeln!(text, "work_disk={path}");
        }
        if self.init == Init::Image {
            text += "init=image\n";
        }
        if let Some(RestoreSeed {
            token,
            now_s,
            random,
            mac,
            machine_id,
        }) = self.restore
        {
            let _ = writeln!(text, "wake={token}\nnow={now_s}\nrandom={random}");
            mac.iter().for_each(|mac| text += &format!("mac={mac}\n"));
            machine_id
                .iter()
                .for_each(|id| text += &format!("machine_id={id}\n"));
        }
        text
    }
}

fn append(
    tar: &mut tar::Builder<Vec<u8>>,
    name: &Path,
    mode: u32,
    mtime_s: u64,
    bytes: &[u8],
) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(mtime_s);
    tar.append_data(&mut header, name, bytes)
        .map_err(|e| Error::io("pack the seed drive", e))
}

/// Encodes the settings for the guest's login shell (`src/image/guest/enter/settings.rs`): records
/// that end with NUL.
fn image_settings(image: &ImageConfig) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let env = image.env.iter().map(|variable| ("env", variable));
    let others = [("user", &image.user), ("working_dir", &image.working_dir)];
    for (key, value) in others.into_iter().chain(env) {
        if value.contains('\0') {
            return Err(Error::invalid("an image's settings cannot contain a NUL"));
        }
        bytes.extend(format!("{key}={value}\0").into_bytes());
    }
    Ok(bytes)
}

/// Packs files without entries for directories, so that the guest's directories keep their owner
/// and mode.
fn files_tar(files: &[SeedFile]) -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for file in files {
        let name = file
            .path
            .strip_prefix("/")
            .map_err(|_| Error::internal(format!("{} is not absolute", file.path.display())))?;
        append(&mut tar, name, file.mode, file.mtime_s, &file.bytes)?;
    }
    tar.into_inner()
        .map_err(|e| Error::io("pack the seed drive", e))
}

/// The kernel's random numbers, for keys.
struct KernelRandom;

impl rand_core::CryptoRng for KernelRandom {}

impl rand_core::RngCore for KernelRandom {
    fn next_u32(&mut self) -> u32 {
        u32::from_ne_bytes(random::bytes())
    }
    fn next_u64(&mut self) -> u64 {
        u64::from_ne_bytes(random::bytes())
    }
    fn fill_bytes(&mut self, into: &mut [u8]) {
        for chunk in into.chunks_mut(32) {
            chunk.copy_from_slice(&random::bytes::<32>()[..chunk.len()]);
        }
    }
    fn try_fill_bytes(&mut self, into: &mut [u8]) -> std::result::Result<(), rand_core::Error> {
        self.fill_bytes(into);
        Ok(())
    }
}

/// An Ed25519 key pair. `Debug` does not print the private key.
#[derive(Clone)]
pub struct KeyPair {
    private: String,
    public_line: String,
    public_blob: Vec<u8>,
}

impl KeyPair {
    pub fn generate(comment: &str) -> Result<Self> {
        let mut key = PrivateKey::random(&mut KernelRandom, Algorithm::Ed25519)
            .map_err(|e| Error::new(Kind::Host, "generate a key pair").with_source(e))?;
        key.set_comment(comment);
        Self::of(&key)
    }

    /// Parses the text that [`KeyPair::private_openssh`] returns.
    pub fn from_private_openssh(text: &str) -> Result<Self> {
        let key = PrivateKey::from_openssh(text)
            .map_err(|e| Error::new(Kind::Host, "read a private key").with_source(e))?;
        Self::of(&key)
    }

    fn of(key: &PrivateKey) -> Result<Self> {
        let bad = |e| Error::new(Kind::Internal, "encode a key").with_source(e);
        Ok(Self {
            private: key.to_openssh(LineEnding::LF).map_err(bad)?.to_string(),
            public_line: key.public_key().to_openssh().map_err(bad)?,
            public_blob: key.public_key().to_bytes().map_err(bad)?,
        })
    }

    /// Returns the unencrypted private key in OpenSSH's format.
    pub fn private_openssh(&self) -> &str {
        &self.private
    }
    /// Returns the public key as a line of `authorized_keys` (`ssh-ed25519 AAAA... comment`),
    /// without a line end.
    pub fn public_line(&self) -> &str {
        &self.public_line
    }
    /// Returns the public key in SSH's wire format (RFC 4253, 6.6; RFC 8709), for comparing host
    /// keys.
    pub fn public_blob(&self) -> &[u8] {
        &self.public_blob
    }
}

impl std::fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeyPair({})", self.public_line)
    }
}

/// Formats a raw public key as `ssh-ed25519 AAAA...`.
pub fn public_line(blob: &[u8]) -> Result<String> {
    let bad = |e: ssh_key::Error| Error::internal("write a public key").with_source(e);
    ssh_key::PublicKey::from_bytes(blob)
        .map_err(bad)?
        .to_openssh()
        .map_err(bad)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{Command, Commands, HostCommands};
    use crate::ids::VmName;
    use crate::locks::Cancel;
    use expect_test::expect;
    use std::os::unix::fs::PermissionsExt;

    fn seed_bytes(key: &KeyPair, keys: &[String]) -> Result<Vec<u8>> {
        let name: VmName = "brave-otter".parse().unwrap();
        Seed {
            host_name: name.as_str(),
            network: &Network::user_mode(),
            authorized_keys: keys,
            host_key: key,
            work_disk: None,
            files: &[],
            init: Init::Fcd,
            image: None,
            restore: None,
        }
        .tar()
    }

    #[test]
    fn seed_contains_identity_and_keys() {
        let key = KeyPair::generate("host").unwrap();
        let keys = ["ssh-ed25519 AAAA fcd".to_owned()];
        let bytes = seed_bytes(&key, &keys).unwrap();
        assert_eq!(bytes.len() % 512, 0);
        assert_eq!(bytes, seed_bytes(&key, &keys).unwrap());
        let mut seen = String::new();
        let mut archive = tar::Archive::new(&bytes[..]);
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let header = entry.header();
            let (mode, uid, mtime) = (
                header.mode().unwrap(),
                header.uid().unwrap(),
                header.mtime().unwrap(),
            );
            let name = entry.path().unwrap().display().to_string();
            let mut text = String::new();
            std::io::Read::read_to_string(&mut entry, &mut text).unwrap();
            if name == "host_key" {
                assert_eq!(text, key.private_openssh());
                text = "...\n".to_owned();
            }
            let _ = write!(seen, "{name} {mode:o} {uid} {mtime}\n{text}");
        }
        expect![[r#"
            config 644 0 0
            host_name=brave-otter
            address=10.0.2.15/24
            gateway=10.0.2.2
            dns=10.0.2.3
            host_key 600 0 0
            ...
            authorized_keys 644 0 0
            ssh-ed25519 AAAA fcd
        "#]]
        .assert_eq(&seen);
    }

    #[test]
    fn seed_contains_ipv6_settings() {
        let key = KeyPair::generate("host").unwrap();
        let config = |network: &Network| {
            Seed {
                host_name: "web",
                network,
                authorized_keys: &[],
                host_key: &key,
                work_disk: None,
                files: &[],
                init: Init::Fcd,
                image: None,
                restore: None,
            }
            .config()
        };
        expect![[r#"
            host_name=web
            address=10.0.2.15/24
            gateway=10.0.2.2
            address6=fec0::15/64
            gateway6=fec0::2
            dns=10.0.2.3
            dns=fec0::3
        "#]]
        .assert_eq(&config(&Network::user_mode_with_ipv6(true)));
        assert!(!config(&Network::user_mode_with_ipv6(false)).contains("fec0::3"));
    }

    #[test]
    fn image_settings_are_records_with_nul() {
        let mut image = ImageConfig {
            user: "dev".into(),
            env: vec!["A=1\n2".into(), "B=".into()],
            working_dir: "/srv".into(),
            ..ImageConfig::default()
        };
        assert_eq!(
            image_settings(&image).unwrap(),
            b"user=dev\0working_dir=/srv\0env=A=1\n2\0env=B=\0"
        );
        image.env.push("C=\0user=root".into());
        assert!(image_settings(&image).is_err());
    }

    #[test]
    fn seed_contains_files_and_work_disk() {
        let (name, key) = ("web", KeyPair::generate("").unwrap());
        let long = format!(
            "/{}/x",
            ["a".repeat(90), "b".repeat(90), "c".repeat(90)].join("/")
        );
        let file = |path: &str, bytes: &[u8]| SeedFile {
            path: path.into(),
            mode: 0o600,
            mtime_s: 7,
            bytes: bytes.to_vec(),
        };
        let files = [file("/etc/a", b"one"), file(&long, b"two")];
        let network = Network::user_mode();
        let seed = Seed {
            host_name: name,
            network: &network,
            authorized_keys: &[],
            host_key: &key,
            work_disk: Some("/work"),
            files: &files,
            init: Init::Fcd,
            image: None,
            restore: None,
        };
        assert!(seed.config().ends_with("\nwork_disk=/work\n"));
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("seed"), seed.tar().unwrap()).unwrap();
        let line = "tar -xf seed && mkdir -m 700 etc && tar -xf files.tar && stat -c %a:%Y etc/a a*/b*/c*/x && cat a*/b*/c*/x";
        let command = Command::new("sh").args(["-ec", line]).cwd(dir.path());
        let out = HostCommands
            .run(&command, &Cancel::try_new().unwrap(), &mut |_| {})
            .unwrap();
        assert_eq!(String::from_utf8(out.stdout).unwrap(), "600:7\n600:7\ntwo");
        let etc = std::fs::metadata(dir.path().join("etc")).unwrap();
        assert_eq!(
            etc.permissions().mode() & 0o777,
            0o700,
            "an existing directory keeps its mode"
        );
    }

    #[test]
    fn key_with_a_line_break_is_refused() {
        let key = KeyPair::generate("").unwrap();
        assert!(seed_bytes(&key, &["a\nb".to_owned()]).is_err());
    }

    #[test]
    fn seed_drive_is_private_and_replaces_an_older_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seed");
        std::fs::write(&path, "old").unwrap();
        let (name, key) = ("web", KeyPair::generate("").unwrap());
        let network = Network::user_mode();
        let seed = Seed {
            host_name: name,
            network: &network,
            authorized_keys: &[],
            host_key: &key,
            work_disk: None,
            files: &[],
            init: Init::Fcd,
            image: None,
            restore: None,
        };
        seed.write(&path, None).unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(std::fs::read(&path).unwrap(), seed.tar().unwrap());
    }

    #[test]
    fn generated_keys_are_accepted_by_openssh() {
        let pair = KeyPair::generate("fcd web").unwrap();
        assert!(!format!("{pair:?}").contains("PRIVATE"));
        let again = KeyPair::from_private_openssh(pair.private_openssh()).unwrap();
        assert_eq!(again.public_line(), pair.public_line());
        assert_eq!(again.public_blob(), pair.public_blob());
        assert_eq!(&pair.public_blob()[..15], b"\0\0\0\x0bssh-ed25519");

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, pair.private_openssh()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let command = Command::new("ssh-keygen").args(["-y", "-f"]).arg(&path);
        let out = HostCommands
            .run(&command, &Cancel::try_new().unwrap(), &mut |_| {})
            .unwrap();
        assert_eq!(
            String::from_utf8(out.stdout).unwrap().trim_end(),
            pair.public_line()
        );
    }

    #[test]
    fn malformed_key_is_refused() {
        assert!(KeyPair::from_private_openssh("-----BEGIN OPENSSH PRIVATE KEY-----\n").is_err());
    }
}
