//! Opens a repository: checks that it belongs to the tree and that git agrees, and reads its
//! configuration.

use super::commands::Commands;
use super::layout::{Claim, Layout};
use super::paths::real;
use super::{Config, Git};
use crate::error::{Error, Kind, Result};
use crate::locks::Cancel;
use crate::workspace::options::Options;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

impl Git {
    /// Opens the repository and reads its configuration. Returns `invalid_tree` if the repository
    /// does not belong to the tree, or if git does not accept `top` as the top of its work tree.
    pub(crate) fn open(top: &Path, options: &Options, cancel: &Cancel) -> Result<(Self, Config)> {
        let layout = Layout::find(top)?;
        let allowed = options.allowed_alternates()?;
        let commands = Commands::new(top.to_owned(), options.env.clone(), cancel.clone());
        let mut git = Self {
            commands,
            layout,
            allowed,
        };
        git.check_claim()?;
        git.layout.check(&git.allowed)?;
        let mut config = git.read_config()?;
        config.add_identity(&git.commands.env);
        for dir in git.safe_directories(&config)? {
            git.commands.set(b"safe.directory", &dir);
        }
        if let Some(file) = git.excludes_path(&config) {
            git.commands
                .set(b"core.excludesFile", file.as_os_str().as_bytes());
        }
        if let Some(file) = git.attributes_path(&config) {
            git.commands
                .set(b"core.attributesFile", file.as_os_str().as_bytes());
        }
        git.check_answers()?;
        Ok((git, config))
    }

    /// Checks that git finds the same repository that `Layout::find` found. Returns `invalid_tree`
    /// otherwise.
    fn check_answers(&self) -> Result<()> {
        let shown = self
            .commands
            .path(&["rev-parse", "--show-toplevel"])
            .map_err(|e| self.commands.refused(e))?;
        if !real(&shown).is_ok_and(|shown| shown == self.commands.top) {
            return Err(self.unused());
        }
        for (args, want) in [
            ("--absolute-git-dir", &self.layout.git_dir),
            ("--git-common-dir", &self.layout.common),
        ] {
            let said = self
                .commands
                .path(&["rev-parse", args])
                .map_err(|e| self.commands.refused(e))?;
            if !real(&said).is_ok_and(|said| said == *want) {
                return Err(self.unused());
            }
        }
        Ok(())
    }

    fn unused(&self) -> Error {
        Error::new(
            Kind::InvalidTree,
            format!(
                "{} has a .git that git does not use for this directory",
                self.commands.top.display()
            ),
        )
        .hint(format!(
            "look with: git -C {} status",
            self.commands.quoted_top()
        ))
    }

    /// Checks that a repository outside the tree points back at the tree. A hostile tree could name
    /// any repository that the caller can read.
    fn check_claim(&self) -> Result<()> {
        let claim = self.layout.claim();
        let is_own = match claim {
            Claim::Inside | Claim::Worktree => true,
            Claim::Setting => {
                self.allowed
                    .iter()
                    .any(|dir| self.layout.git_dir.starts_with(dir))
                    || self.is_named_by_setting()?
            }
            Claim::OtherWorktree(_) | Claim::None => false,
        };
        if is_own {
            Ok(())
        } else {
            Err(self.layout.foreign(&claim))
        }
    }

    /// True if the repository's `core.worktree` names the tree, as it does for a submodule.
    fn is_named_by_setting(&self) -> Result<bool> {
        for name in ["config", "config.worktree"] {
            let file = self.layout.git_dir.join(name);
            if !file.is_file() {
                continue;
            }
            // Run git outside the tree, so that nothing in the tree can influence the answer.
            let c = self
                .commands
                .command(&["config", "--null", "--no-includes", "--file"]);
            let c = c.arg(&file).args(["--get-all", "core.worktree"]).cwd("/");
            let (_, values) = self.commands.ask_status(&c, &[0, 1])?;
            let named = values
                .split(|b| *b == 0)
                .rfind(|v| !v.is_empty())
                .map(OsStr::from_bytes);
            let named = named.and_then(|v| real(&self.layout.git_dir.join(v)).ok());
            if named.is_some_and(|dir| dir == self.commands.top) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn read_config(&self) -> Result<Config> {
        let args = ["--null", "--show-scope", "--show-origin", "--list"];
        let (_, answer) = self
            .commands
            .ask_config(&args)
            .map_err(|e| self.commands.refused(e))?;
        Ok(Config::from_list(&answer, &|origin| {
            self.is_own_file(origin)
        }))
    }

    /// True if the configuration file belongs to the repository. A repository's configuration can
    /// include files that belong to anybody.
    fn is_own_file(&self, origin: &[u8]) -> bool {
        let Some(file) = origin.strip_prefix(b"file:") else {
            return false;
        };
        let Ok(file) = real(&self.commands.top.join(OsStr::from_bytes(file))) else {
            return false;
        };
        [
            &self.commands.top,
            &self.layout.git_dir,
            &self.layout.common,
        ]
        .into_iter()
        .any(|dir| file.starts_with(dir))
    }

    /// Returns the caller's `safe.directory` values, with paths such as `~/proj` resolved in the
    /// caller's home. Our other git commands get a different home.
    fn safe_directories(&self, config: &Config) -> Result<Vec<Vec<u8>>> {
        let given = &config.safe_directories;
        if !given
            .iter()
            .any(|dir| dir.starts_with(b"~") || dir.starts_with(b"%("))
        {
            return Ok(given.clone());
        }
        let args = [
            "--null",
            "--show-scope",
            "--type=path",
            "--get-all",
            "safe.directory",
        ];
        match self.commands.ask_config(&args) {
            Ok((_, answer)) => Ok(Config::values(&answer)),
            Err(e) if e.kind() == Kind::CommandFailed => Ok(given.clone()),
            Err(e) => Err(e),
        }
    }
}
