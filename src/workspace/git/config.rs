//! Reads the caller's git configuration and selects the part that the guest gets.

use crate::workspace::caller_env::CallerEnv;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// The settings that are sent to the guest: they affect `git status` and hold no secret. Their
/// values are single words.
const CARRIED: &[&str] = &[
    "core.filemode",
    "core.symlinks",
    "core.autocrlf",
    "core.eol",
    "core.safecrlf",
    "core.ignorecase",
    "core.quotepath",
    "status.renames",
    "status.showuntrackedfiles",
    "diff.renames",
    "core.sparsecheckout",
    "core.sparsecheckoutcone",
];

/// Maximum length of a remote's name, and of a filter, that is sent to the guest.
const WORD_BYTES_MAX: usize = 64;

/// The settings of a remote that matter here.
#[derive(Debug, Default)]
struct Remote {
    promisor: bool,
    filter: Option<String>,
    url: Option<String>,
}

/// Settings that name the author and the committer, each with an environment variable that
/// overrides it or, in the case of `EMAIL`, replaces a missing value. `user.name` has no variable.
const IDENTITY: &[(&str, &str)] = &[
    ("user.name", ""),
    ("user.email", "EMAIL"),
    ("author.name", "GIT_AUTHOR_NAME"),
    ("author.email", "GIT_AUTHOR_EMAIL"),
    ("committer.name", "GIT_COMMITTER_NAME"),
    ("committer.email", "GIT_COMMITTER_EMAIL"),
];

/// The caller's git configuration.
#[derive(Debug, Default)]
pub(in crate::workspace) struct Config {
    /// The values of the settings in [`IDENTITY`], for commits in the guest.
    identity: BTreeMap<String, Vec<u8>>,
    /// Settings listed in [`CARRIED`], in the order in which they were found.
    pub carried: Vec<(String, String)>,
    pub(super) safe_directories: Vec<Vec<u8>>,
    /// The value of `core.excludesFile`, and whether the repository itself set it.
    pub(super) excludes_file: Option<(Vec<u8>, bool)>,
    /// The value of `core.attributesFile`, and whether the repository itself set it.
    pub(super) attributes_file: Option<(Vec<u8>, bool)>,
    /// Names of filters that the caller's git would run.
    pub filters: BTreeSet<Vec<u8>>,
    pub partial_clone: bool,
    /// Remotes by name. Only promisors are sent to the guest.
    remotes: BTreeMap<String, Remote>,
    /// The value of `extensions.partialClone`, an older way to name a promisor.
    promisor: Option<String>,
}

impl Config {
    /// Adds the identity from the caller's environment. The environment overrides settings, except
    /// for `EMAIL`, which is git's last resort.
    pub(crate) fn add_identity(&mut self, env: &CallerEnv) {
        for (key, variable) in IDENTITY {
            let given = env
                .identity
                .get(OsStr::new(variable))
                .filter(|v| !v.is_empty());
            let Some(value) = given else { continue };
            if *key != "user.email" || !self.identity.contains_key(*key) {
                self.identity
                    .insert((*key).to_owned(), value.as_bytes().to_vec());
            }
        }
    }

    /// Parses `git config --null --show-scope --show-origin --list`: scope NUL origin NUL key LF
    /// value NUL. `is_own` decides whether the file that a repository's setting comes from belongs
    /// to the repository.
    pub(super) fn from_list(list: &[u8], is_own: &dyn Fn(&[u8]) -> bool) -> Self {
        let mut config = Config::default();
        let mut fields = list.split(|b| *b == 0);
        let mut last: (&[u8], bool) = (b"", true);
        while let (Some(scope), Some(origin), Some(item)) =
            (fields.next(), fields.next(), fields.next())
        {
            let (key, value) = match item.iter().position(|b| *b == b'\n') {
                Some(at) => (&item[..at], &item[at + 1..]),
                None => (item, &b"true"[..]),
            };
            let key = String::from_utf8_lossy(key).into_owned();
            let own = is_of_repository(scope);
            if own && last.0 != origin {
                last = (origin, is_own(origin));
            }
            if !own || last.1 {
                config.take(&key, value, own);
            }
        }
        config
    }

    /// Parses `git config --null --show-scope --get-all`, without the settings of the repository.
    pub(super) fn values(list: &[u8]) -> Vec<Vec<u8>> {
        let fields: Vec<&[u8]> = list.split(|b| *b == 0).collect();
        let pairs = fields
            .chunks_exact(2)
            .filter(|pair| !is_of_repository(pair[0]));
        pairs.map(|pair| pair[1].to_vec()).collect()
    }

    fn take(&mut self, key: &str, value: &[u8], own: bool) {
        match key {
            _ if IDENTITY.iter().any(|(name, _)| *name == key) => {
                self.identity.insert(key.to_owned(), value.to_vec());
            }
            "safe.directory" if !own => self.safe_directories.push(value.to_vec()),
            "core.excludesfile" => self.excludes_file = Some((value.to_vec(), own)),
            "core.attributesfile" => self.attributes_file = Some((value.to_vec(), own)),
            "extensions.partialclone" => {
                self.partial_clone = true;
                self.promisor = Some(String::from_utf8_lossy(value).into_owned());
            }
            _ if key.starts_with("remote.") => self.take_remote(&key["remote.".len()..], value),
            _ if let Some(rest) = key.strip_prefix("filter.")
                && let Some((name, "clean" | "smudge" | "process" | "required")) =
                    rest.rsplit_once('.') =>
            {
                self.filters.insert(name.as_bytes().to_vec());
            }
            _ if CARRIED.contains(&key) => {
                if let Ok(word) = std::str::from_utf8(value)
                    && word.len() <= 16
                    && !word.is_empty()
                    && word.bytes().all(|b| b.is_ascii_alphanumeric())
                {
                    self.carried.retain(|(k, _)| k != key);
                    self.carried.push((key.to_owned(), word.to_owned()));
                }
            }
            _ => {}
        }
    }

    /// Records one `remote.NAME.key` setting.
    fn take_remote(&mut self, key: &str, value: &[u8]) {
        let Some((name, key)) = key.rsplit_once('.') else {
            return;
        };
        let remote = self.remotes.entry(name.to_owned()).or_default();
        let text = || String::from_utf8_lossy(value).into_owned();
        match key {
            "promisor" => {
                // Approximates git's boolean syntax. An extra promisor does no harm.
                remote.promisor = !matches!(value, b"false" | b"no" | b"off" | b"0" | b"");
                self.partial_clone |= remote.promisor;
            }
            "partialclonefilter" => remote.filter = Some(text()),
            // git tries several URLs in order, so the first one is used.
            "url" if remote.url.is_none() => remote.url = Some(text()),
            _ => {}
        }
    }

    /// Builds the guest's configuration of the remote that has the objects that a partial clone
    /// lacks. Without this remote, git in the guest considers those objects lost and refuses to
    /// commit. The text is empty if the repository is not a partial clone.
    fn promisor_for_guest(&self) -> String {
        if !self.partial_clone {
            return String::new();
        }
        let is_word = |text: &str| {
            text.len() <= WORD_BYTES_MAX
                && text
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"-_:=.+".contains(&b))
        };
        let is_name = |name: &str| is_word(name) && !name.is_empty() && !name.starts_with('-');
        let marked = self
            .remotes
            .iter()
            .find(|(_, remote)| remote.promisor)
            .map(|(name, _)| name.as_str());
        let name = marked
            .or(self.promisor.as_deref())
            .filter(|name| is_name(name))
            .unwrap_or("origin");
        let mut out = format!(
            "[core]\n\trepositoryformatversion = 1\n[extensions]\n\tpartialClone = {name}\n"
        );
        out.push_str(&format!("[remote \"{name}\"]\n\tpromisor = true\n"));
        let remote = self.remotes.get(name);
        if let Some(filter) = remote
            .and_then(|r| r.filter.as_deref())
            .filter(|f| is_word(f))
        {
            out.push_str(&format!("\tpartialclonefilter = {filter}\n"));
        }
        if let Some(url) = remote.and_then(|r| r.url.as_deref()).and_then(public_url) {
            out.push_str(&format!("\turl = \"{url}\"\n"));
        }
        out
    }

    /// True if only a part of the tree is checked out.
    pub(crate) fn is_sparse(&self) -> bool {
        self.carried
            .iter()
            .any(|(key, value)| key == "core.sparsecheckout" && value == "true")
    }

    /// Builds the lines for the guest's `.git/config`.
    pub(crate) fn for_guest(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (key, _) in IDENTITY {
            if let (Some(value), Some((section, name))) =
                (self.identity.get(*key), key.split_once('.'))
            {
                out.extend_from_slice(format!("[{section}]\n\t{name} = ").as_bytes());
                out.extend(quoted(value));
                out.push(b'\n');
            }
        }
        out.extend(self.promisor_for_guest().into_bytes());
        for (key, value) in &self.carried {
            if let Some((section, name)) = key.split_once('.') {
                out.extend_from_slice(format!("[{section}]\n\t{name} = {value}\n").as_bytes());
            }
        }
        out
    }
}

fn is_of_repository(scope: &[u8]) -> bool {
    matches!(scope, b"local" | b"worktree")
}

/// Returns an HTTPS URL without its credentials. Returns `None` for any other URL and for unusual
/// characters.
fn public_url(url: &str) -> Option<String> {
    let rest = url.strip_prefix("https://")?;
    let (host, path) = rest.split_at(rest.find('/')?);
    let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
    let harmless = |text: &str, more: &[u8]| {
        text.bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b) || more.contains(&b))
    };
    let fits = !host.is_empty() && harmless(host, b":[]") && harmless(path, b"/~+");
    fits.then(|| format!("https://{host}{path}"))
}

/// Quotes a value for a git configuration file.
fn quoted(value: &[u8]) -> Vec<u8> {
    let mut out = vec![b'"'];
    for &b in value {
        match b {
            b'"' | b'\\' => out.extend([b'\\', b]),
            b'\n' => out.extend(b"\\n"),
            b'\t' => out.extend(b"\\t"),
            0 => {}
            _ => out.push(b),
        }
    }
    out.push(b'"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_for_guest_carries_only_harmless_settings() {
        let own = [
            "user.email\na@b",
            "core.autocrlf\ninput",
            "core.sshcommand\nevil",
            "remote.o.url\nhttps://u:p@h",
            "core.eol\n$(x)",
            "safe.directory\n*",
            "core.excludesfile\n/etc/shadow",
            "status.renames",
        ];
        let mut list = String::from(
            "global\0file:g\0user.name\nA \"B\"\0global\0file:g\0safe.directory\n/x\0",
        );
        own.iter()
            .for_each(|item| list.push_str(&format!("local\0file:.git/config\0{item}\0")));
        list.push_str("local\0file:/other/config\0core.eol\ncrlf\0");
        let config = Config::from_list(list.as_bytes(), &|origin| origin == b"file:.git/config");
        assert_eq!(config.safe_directories, [b"/x".to_vec()]);
        assert_eq!(config.excludes_file, Some((b"/etc/shadow".to_vec(), true)));
        let text = String::from_utf8(config.for_guest()).unwrap();
        expect_test::expect![[r#"
            [user]
            	name = "A \"B\""
            [user]
            	email = "a@b"
            [core]
            	autocrlf = input
            [status]
            	renames = true
        "#]]
        .assert_eq(&text);
    }
}
