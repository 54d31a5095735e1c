//! Exec sessions.
