package main

import (
	"strings"
	"testing"
)

func TestTally(t *testing.T) {
	for name, c := range map[string]struct {
		in, want string
		code     int
	}{
		"nothing ran": {``, "0 passed, 0 failed\n", 1},
		"passed": {`
			{"Action":"output","Package":"p","Test":"TestA","Output":"noise\n"}
			{"Action":"pass","Package":"p","Test":"TestA"}
			{"Action":"output","Package":"p","Output":"PASS\n"}
			{"Action":"output","Package":"p","Output":"ok  \tp\t0.1s\n"}
			{"Action":"pass","Package":"p"}
			{"Action":"output","Package":"q","Output":"?   \tq\t[no test files]\n"}
			{"Action":"skip","Package":"q"}`, "ok  \tp\t0.1s\n1 passed, 0 failed\n", 0},
		"failed": {`
			{"Action":"output","Package":"p","Test":"TestA","Output":"why\n"}
			{"Action":"fail","Package":"p","Test":"TestA"}
			{"Action":"output","Package":"p","Output":"FAIL\tp\t0.1s\n"}
			{"Action":"fail","Package":"p"}`, "why\nFAIL\tp\t0.1s\n0 passed, 1 failed\n", 1},
		"skipped": {`
			{"Action":"output","Package":"p","Test":"TestA","Output":"cannot\n"}
			{"Action":"skip","Package":"p","Test":"TestA"}
			{"Action":"pass","Package":"p","Test":"TestB"}
			{"Action":"pass","Package":"p"}`, "cannot\n1 passed, 0 failed, 1 skipped\n", 1},
		"not built": {`
			{"Action":"build-output","ImportPath":"p","Output":"syntax error\n"}
			{"Action":"build-fail","ImportPath":"p"}
			{"Action":"output","Package":"p","Output":"FAIL\tp [build failed]\n"}
			{"Action":"fail","Package":"p"}
			{"Action":"pass","Package":"q","Test":"TestB"}`, "syntax error\nFAIL\tp [build failed]\n1 passed, 1 failed\n", 1},
		"broken outside its tests": {`
			{"Action":"output","Package":"p","Output":"panic in TestMain\n"}
			{"Action":"output","Package":"p","Output":"FAIL\tp\t0.1s\n"}
			{"Action":"fail","Package":"p"}`, "FAIL\tp\t0.1s\npanic in TestMain\n0 passed, 1 failed\n", 1},
	} {
		t.Run(name, func(t *testing.T) {
			var lines []string
			for line := range strings.SplitSeq(c.in, "\n") {
				if line = strings.TrimSpace(line); line != "" {
					lines = append(lines, line+"\n")
				}
			}
			var out strings.Builder
			code := tally(strings.NewReader(strings.Join(lines, "")), &out)
			if out.String() != c.want || code != c.code {
				t.Errorf("exit %d, want %d; printed:\n%swant:\n%s", code, c.code, out.String(), c.want)
			}
		})
	}
}
