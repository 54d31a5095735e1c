//! Rollback of half-done work: steps run last-in first-out on drop unless committed.

type Step<'a> = (&'static str, Box<dyn FnOnce() -> crate::error::Result<()> + 'a>);

/// A stack of named undo steps. Dropping it undoes; a step that fails is logged and the rest go on.
#[derive(Default)]
pub struct Undo<'a> {
    steps: Vec<Step<'a>>,
}

impl<'a> Undo<'a> {
    pub fn new() -> Self {
        Self { steps: Vec::new() }
    }

    pub fn push(&mut self, name: &'static str, step: impl FnOnce() -> crate::error::Result<()> + 'a) {
        self.steps.push((name, Box::new(step)));
    }

    /// The work stands: nothing is undone.
    pub fn commit(mut self) {
        self.steps.clear();
    }

    /// Undoes now and returns the names of the steps that failed.
    pub fn roll_back(mut self) -> Vec<&'static str> {
        self.run()
    }

    fn run(&mut self) -> Vec<&'static str> {
        let mut failed = Vec::new();
        while let Some((name, step)) = self.steps.pop() {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(step));
            match outcome {
                Ok(Ok(())) => {}
                Ok(Err(e)) => {
                    log::warn!("undo {name}: {e}");
                    failed.push(name);
                }
                Err(_) => {
                    log::error!("undo {name}: panicked");
                    failed.push(name);
                }
            }
        }
        failed
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        self.run();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn undoes_last_in_first_out_past_errors_and_panics() {
        let seen = RefCell::new(Vec::new());
        let mut undo = Undo::new();
        undo.push("a", || {
            seen.borrow_mut().push("a");
            Ok(())
        });
        undo.push("b", || Err(crate::error::Error::internal("no")));
        undo.push("c", || panic!("boom"));
        undo.push("d", || {
            seen.borrow_mut().push("d");
            Ok(())
        });
        let failed = undo.roll_back();
        assert_eq!(failed, ["c", "b"]);
        assert_eq!(*seen.borrow(), ["d", "a"]);
    }

    #[test]
    fn commit_undoes_nothing() {
        let seen = RefCell::new(0);
        let mut undo = Undo::new();
        undo.push("a", || {
            *seen.borrow_mut() += 1;
            Ok(())
        });
        undo.commit();
        assert_eq!(*seen.borrow(), 0);
    }
}
