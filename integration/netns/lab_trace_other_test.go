//go:build !amd64

package netns_test

import (
	"fmt"
	"runtime"
	"syscall"
)

var errArchitecture = fmt.Errorf("the sweep over system calls reads registers of amd64; this is %s", runtime.GOARCH)

func callNumber(int) (uint64, error)       { return 0, errArchitecture }
func skipCall(int) error                   { return errArchitecture }
func returnErrno(int, syscall.Errno) error { return errArchitecture }
