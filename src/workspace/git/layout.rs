//! Finds the directories of a repository and determines whether the repository belongs to the tree.
//!
//! A hostile tree can claim any repository that the caller can read: with a link, a `.git` or
//! `commondir` file, or an alternate. Everything that git would read must be below the top of the
//! tree, below a repository that points back at it, or below a path that the caller allowed. fcctl
//! checks this itself, before any git command runs there. `stores.rs` checks what is below the
//! directories that are found here.

use super::paths::{look, quoted, read_pointer, real, refusal, trim};
use crate::error::{Error, Kind, Result};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The location of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub top: PathBuf,
    /// `top/.git`, or the directory that it points to.
    pub git_dir: PathBuf,
    /// The directory that all worktrees of a repository share, with its objects and refs.
    pub common: PathBuf,
}

/// The evidence that a repository belongs to the tree.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// The repository is inside the tree.
    Inside,
    /// The repository lists the tree among its worktrees.
    Worktree,
    /// The repository lists this worktree at another path. Holds the `.git` file at that path.
    OtherWorktree(PathBuf),
    /// Only `core.worktree` can show that the tree belongs to the repository.
    Setting,
    /// There is no proof, because the repository uses another repository's common directory.
    None,
}

impl Layout {
    /// Follows `.git` and `commondir` as git does. `top` must not contain links. Returns
    /// `invalid_tree` if `.git` or `commondir` cannot be followed to a directory.
    pub(super) fn find(top: &Path) -> Result<Self> {
        let dot_git = top.join(".git");
        let target =
            real(&dot_git).map_err(|e| refusal(format!("follow {}", dot_git.display()), e))?;
        let git_dir = if target.is_dir() {
            target
        } else {
            Self::follow_file(top, &dot_git)?
        };
        let commondir = git_dir.join("commondir");
        let common = match read_pointer(&commondir) {
            Ok(None) => git_dir.clone(),
            Ok(Some(text)) => {
                let common = git_dir.join(OsStr::from_bytes(trim(&text)));
                real(&common).map_err(|e| refusal(format!("follow {}", commondir.display()), e))?
            }
            Err(e) => return Err(refusal(format!("read {}", commondir.display()), e)),
        };
        Ok(Self {
            top: top.to_owned(),
            git_dir,
            common,
        })
    }

    fn follow_file(top: &Path, dot_git: &Path) -> Result<PathBuf> {
        let shown = dot_git.display();
        let text = read_pointer(dot_git)
            .map_err(|e| refusal(format!("read {shown}"), e))?
            .unwrap_or_default();
        let Some(named) = text.strip_prefix(b"gitdir: ") else {
            return Err(Error::new(
                Kind::InvalidTree,
                format!("{shown} is not a directory and does not name one"),
            )
            .hint(look(top)));
        };
        let named = top.join(OsStr::from_bytes(trim(named)));
        let dir = real(&named).map_err(|e| refusal(format!("follow {shown}"), e))?;
        if dir.is_dir() {
            return Ok(dir);
        }
        let (what, hint) = if dir.exists() {
            ("not a directory", look(top))
        } else {
            let top = quoted(top);
            (
                "missing",
                format!("if the main repository was moved, run: git -C MAIN worktree repair {top}"),
            )
        };
        Err(Error::new(
            Kind::InvalidTree,
            format!("{shown} leads to {}, which is {what}", dir.display()),
        )
        .hint(hint))
    }

    /// Determines whether the repository belongs to the tree. Files inside the tree prove nothing
    /// about a repository outside it, so the main repository of a worktree must name the tree.
    pub(super) fn claim(&self) -> Claim {
        let inside = |p: &Path| p.starts_with(&self.top);
        if inside(&self.git_dir) && inside(&self.common) {
            return Claim::Inside;
        }
        if self.git_dir == self.common {
            return Claim::Setting;
        }
        if self.git_dir.parent() != Some(&self.common.join("worktrees")) {
            return Claim::None;
        }
        let text = read_pointer(&self.git_dir.join("gitdir"))
            .ok()
            .flatten()
            .unwrap_or_default();
        let back = self.git_dir.join(OsStr::from_bytes(trim(&text)));
        let ours = back.file_name() == Some(OsStr::new(".git"))
            && back
                .parent()
                .is_some_and(|dir| real(dir).is_ok_and(|dir| dir == self.top));
        if ours {
            Claim::Worktree
        } else {
            Claim::OtherWorktree(back)
        }
    }

    /// Builds the error for a repository that does not belong to the tree.
    pub(super) fn foreign(&self, claim: &Claim) -> Error {
        let dot_git = self.top.join(".git");
        let error = |text: String| Error::new(Kind::InvalidTree, text);
        match claim {
            Claim::OtherWorktree(back) => {
                let there = back.parent().unwrap_or(back);
                let e = error(format!(
                    "{} leads to {}, which does not belong to this tree but to {}",
                    dot_git.display(),
                    self.git_dir.display(),
                    there.display()
                ));
                // If the worktree still exists at its old place, this tree is a copy of it, and a
                // repair would detach the original.
                if back.symlink_metadata().is_ok() {
                    e.hint(format!("send that worktree instead: {}", quoted(there)))
                } else {
                    e.hint(format!(
                        "if you moved the worktree here, run: git -C {} worktree repair",
                        quoted(&self.top)
                    ))
                }
            }
            Claim::None => error(format!(
                "{} leads to {}, which does not name {} as its worktree",
                self.git_dir.join("commondir").display(),
                self.common.display(),
                self.top.display()
            ))
            .hint(look(&self.top)),
            _ => error(format!(
                "{} leads to {}, which does not belong to this tree",
                dot_git.display(),
                self.git_dir.display()
            ))
            .hint(format!(
                "if it does belong to this tree, pass --allow-alternate {}",
                quoted(&self.git_dir)
            )),
        }
    }
}
