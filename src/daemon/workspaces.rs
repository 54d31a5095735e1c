//! stub
use super::*;
use crate::api::workspace::*;
impl Daemon {
    pub fn prepare(&self, _c: &Caller, _r: PrepareRequest, _f: Vec<std::os::fd::OwnedFd>, _n: &Notes) -> Result<Begun> {
        todo!()
    }
    pub fn export(&self, _c: &Caller, _r: ExportRequest, _f: Vec<std::os::fd::OwnedFd>) -> Result<Begun> {
        todo!()
    }
    pub fn guest_roots(&self) -> Vec<String> {
        vec![]
    }
}
