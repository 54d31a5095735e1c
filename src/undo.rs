//! Rolls back unfinished work: [`Undo`] runs its steps in reverse order when it is dropped, unless
//! the work was committed.

type Step<'a> = (
    &'static str,
    Box<dyn FnOnce() -> crate::error::Result<()> + 'a>,
);

/// A stack of named undo steps, which run in reverse order when the stack is dropped. A step that
/// fails or panics is logged, and the remaining steps still run.
#[derive(Default)]
pub(crate) struct Undo<'a> {
    steps: Vec<Step<'a>>,
}

impl<'a> Undo<'a> {
    pub(crate) fn new() -> Self {
        Self { steps: Vec::new() }
    }

    pub(crate) fn push(
        &mut self,
        name: &'static str,
        step: impl FnOnce() -> crate::error::Result<()> + 'a,
    ) {
        self.steps.push((name, Box::new(step)));
    }

    /// Keeps the work: discards all undo steps without running them.
    pub(crate) fn commit(mut self) {
        self.steps.clear();
    }

    fn run(&mut self) {
        while let Some((name, step)) = self.steps.pop() {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(step));
            match outcome {
                Ok(Ok(())) => {}
                Ok(Err(e)) => log::warn!("undo {name}: {e}"),
                Err(_) => log::error!("undo {name}: panicked"),
            }
        }
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
    fn steps_run_in_reverse_order_despite_errors_and_panics() {
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
        drop(undo);
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
